"""Clipping of activations before they are quantized, so that a token's outliers do not set its scale."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.quantize.fixed_point import fixed_point_mean


def check_clip(ratio: float | None) -> None:
    """Raises ValueError unless `ratio` is None or a finite number above 0."""
    if ratio is not None and not 0 < ratio < float("inf"):
        raise ValueError(f"clip_activations must be None or a finite number above 0, got {ratio!r}")


@functools.partial(jax.jit, static_argnums=1)
def clip_tokens(x: Float[Array, "*batch k"], ratio: float) -> Float[Array, "*batch k"]:
    """Clips every number to +-bound, with bound = `ratio` times the mean magnitude of its token.

    The quantizer of activations sets a token's scale by its smallest and its largest number. With a ratio of 1, one
    bit stores the sign of each number and the mean magnitude as the scale, the choice of least squared error
    (XNOR-Net, arXiv 1603.05279, section 3.1). For 2 bits and normally distributed numbers the squared error is least
    near a ratio of 2.

    The gradient treats the bound as a constant: 1 where |x| <= bound, and 0 beyond, where the result does not depend
    on x (PACT, arXiv 1805.06085, section 3; for one bit, the hard tanh of arXiv 1602.02830, section 1.3).

    Args:
      x: one token per row, any float dtype; the bound is rounded to that dtype.
      ratio: above 0.

    Returns:
      x's shape and dtype.
    """
    # The barriers keep XLA from fusing this with other operations, so that training and inference round alike.
    rows = jax.lax.optimization_barrier(jax.lax.stop_gradient(x))
    bound = (ratio * fixed_point_mean(jnp.abs(rows))[..., None]).astype(x.dtype)
    return _clipped(x, jax.lax.optimization_barrier(jnp.clip(rows, -bound, bound)), jnp.abs(rows) <= bound)


@jax.custom_jvp
def _clipped(x, value, inside):
    return value


@_clipped.defjvp
def _(primals, tangents):
    _, value, inside = primals
    return value, jnp.where(inside, tangents[0], 0)
