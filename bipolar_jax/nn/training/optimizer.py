"""AdamW for low-bit training: weights decay, scales and norms do not, learned steps have a rate of their own."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import optax


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    decay_embeddings: bool = False,
    step_size_rate: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients clipped by their global norm.

    Works on NNX models (`nnx.Optimizer(model, bj.nn.adamw(1e-3), wrt=nnx.Param)`), on linen parameters, and on any
    tree whose leaves can be told by their last name.

    Args:
      learning_rate: a number, or a function of the step.
      b1, b2: decay of Adam's averages.
      weight_decay: of kernels, and of embeddings if `decay_embeddings`; never of norms, biases or learned step sizes.
      clip_norm: largest global norm of the gradient.
      decay_embeddings: whether embeddings decay.
      step_size_rate: factor on the updates of learned step sizes. Adam's updates are as large as the learning rate,
        which is large compared with a step size (LSQ, arXiv 1902.08153).

    Returns:
      An optax transformation.
    """
    decaying = {"kernel", "embedding"} if decay_embeddings else {"kernel"}
    transformation = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=_mask(lambda name: name in decaying)),
        optax.masked(optax.scale(step_size_rate), _mask(lambda name: name == "step_size")),
    )

    def update(*arguments, **options):
        # Adam's bias correction (optax 0.2.8) raises a float to an int32, which JAX's strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(*arguments, **options)

    return transformation._replace(update=update)


def _mask(chooses: Callable[[str], bool]) -> Callable:
    """A function from a tree to a tree of bool, by the last name of each leaf's path."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: chooses(_last_name(path)), tree)


def _last_name(path: tuple) -> str:
    """ "kernel" of ['dense']['kernel'], of ['dense'].kernel.value (NNX), and of the flat name ['dense/kernel']."""
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    return re.sub(r"/(value|raw_value)$", "", text).rpartition("/")[2]
