"""Distillation: a loss that trains a model to match a float teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def distillation_loss(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "*batch classes"],
    temperature: float = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """T^2 KL(teacher || student) of the softened distributions, averaged over the batch.

    Both logits are divided by the temperature T. The factor T^2 keeps the magnitude of the
    gradients about the same for every T (Hinton et al. 2015, arXiv 1503.02531, section 2). No
    gradient passes to the teacher.

    Args:
      student: logits of the model in training.
      teacher: logits of the float model.
      temperature: above 0; a higher one gives more weight to unlikely classes.
      where: False for elements of the batch to leave out, such as padding.

    Returns:
      float32 scalar.

    Raises:
      ValueError: shapes that differ, or a temperature that is not above 0.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {student.shape} and teacher logits {teacher.shape} differ in shape")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if where is not None and where.shape != student.shape[:-1]:
        raise ValueError(f"where has shape {where.shape}, logits {student.shape} need {student.shape[:-1]}")
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    # A class with a teacher logit of -Inf adds 0, but exp(teacher) * (teacher - student) would be NaN.
    possible = teacher != -jnp.inf  # true of NaN, which must reach the loss
    terms = jnp.where(possible, jnp.exp(teacher) * (jnp.where(possible, teacher, 0) - student), 0)
    return temperature**2 * jnp.mean(jnp.sum(terms, axis=-1), where=where)
