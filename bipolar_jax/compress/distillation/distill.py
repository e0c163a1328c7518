"""The loss and the step of distillation after rounding.

The student's token probabilities learn from those of the float model (KL divergence; Hinton et al. 2015, arXiv
1503.02531), on text that the float model wrote itself (LLM-QAT, Liu et al. 2023, arXiv 2305.17888). It begins at what
calibration found, so rates are low: a step moves a latent weight by a hundredth to a thousandth of a grid step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from bipolar_jax.compress.distillation.learning_model import Learned, Student, is_latent
from bipolar_jax.nn import distillation_loss


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How fast it learns: linear warm-up, then cosine decay to 0.

    Attributes:
      steps: updates.
      learning_rate: the peak, of latent weights.
      warmup: updates of the warm-up.
      scale_rate: times the learning rate is that of scales, offsets, norms and biases.
      clip_norm: largest global norm of the gradient.

    Raises:
      ValueError: numbers outside these ranges.
    """

    steps: int
    learning_rate: float
    warmup: int = 50
    scale_rate: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup={self.warmup} must be at least 0 and below steps={self.steps}")
        for name in ("learning_rate", "scale_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def rate(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The learning rate of the update after `step` others."""
        done = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, (done + 1) / max(self.warmup, 1))
        return self.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * done / self.steps))

    def optimizer(self) -> optax.GradientTransformation:
        """Adam (arXiv 1412.6980) for `Learned` numbers, without decay of weights."""
        transformation = optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(0.9, 0.95, eps=1e-10),  # gradients of single weights are far below Adam's usual 1e-8
            optax.scale_by_learning_rate(self.rate),
            optax.masked(optax.scale(self.scale_rate), lambda params: {name: not is_latent(name) for name in params}),
        )

        def update(*arguments, **options):
            # Adam's bias correction raises a float to an int32, which JAX's strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                return transformation.update(*arguments, **options)

        return transformation._replace(update=update)


def window_loss(student: nnx.Module, teacher: nnx.Module, ids: Int[Array, "windows length"]) -> Float[Array, ""]:
    """The mean KL(teacher || student) of a next token, in nats.

    Both models have `hidden_states(ids)` and `logits(hidden)`, as `models.Transformer`. The logits, the largest arrays
    by far, are those of one window at a time, and computed once more for the gradient.
    """
    hidden = student.hidden_states(ids), jax.lax.stop_gradient(teacher.hidden_states(ids))

    @jax.checkpoint
    def one_window(hidden):
        learning, float_ones = hidden
        return distillation_loss(student.logits(learning), teacher.logits(float_ones))

    return jnp.mean(jax.lax.map(one_window, hidden))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillationState:
    """What a step updates.

    Attributes:
      params: by path, see `Student`.
      optimizer: optax state, with the number of updates.
    """

    params: Learned
    optimizer: Any

    @classmethod
    def initial(cls, student: Student, schedule: Schedule) -> DistillationState:
        """Before the first step. Copies the student's numbers: steps donate their state."""
        params = {name: jnp.array(value) for name, value in student.params.items()}
        return cls(params, schedule.optimizer().init(params))


Step = Callable[
    [DistillationState, Int[Array, "windows length"]], tuple[DistillationState, dict[str, Float[Array, ""]]]
]


def make_step(student: Student, teacher: nnx.Module, schedule: Schedule, *, parts: int = 1) -> Step:
    """A function (state, windows) -> (state, metrics) that runs one compiled program and donates the state.

    The metrics "loss" and "gradient_norm" are those before the update.

    Args:
      student: what learns.
      teacher: the float model.
      schedule: the rates.
      parts: the windows of a step are run in so many parts, one after the other, where all activations of all layers
        would take too much memory; it divides their number.
    """
    optimizer = schedule.optimizer()

    def program(state, rest, teacher, ids):
        def add_part(sums, ids):
            found = jax.value_and_grad(lambda params: window_loss(student.model(params, rest), teacher, ids))(
                state.params
            )
            return jax.tree.map(jnp.add, sums, found), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
        # XLA makes no loop of one part.
        sums, _ = jax.lax.scan(add_part, zeros, ids.reshape(parts, -1, ids.shape[-1]))
        loss, gradient = jax.tree.map(lambda array: array / parts, sums)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return DistillationState(optax.apply_updates(state.params, updates), optimizer_state), metrics

    compiled = jax.jit(program, donate_argnums=0)
    return lambda state, ids: compiled(state, student.rest, teacher, jnp.asarray(ids, jnp.int32))
