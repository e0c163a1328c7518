"""Stochastic rounding, for gradients: right on average, whatever the bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MIN_GRADIENT_BITS, MAX_GRADIENT_BITS = 2, 8


def check_gradient_bits(bits: int) -> None:
    """Raises ValueError unless 2 <= bits <= 8."""
    if type(bits) is not int or not MIN_GRADIENT_BITS <= bits <= MAX_GRADIENT_BITS:
        raise ValueError(
            f"gradient bits must be an integer from {MIN_GRADIENT_BITS} to {MAX_GRADIENT_BITS}, got {bits!r}: "
            "None leaves gradients float"
        )


def stochastic_round(x: Float[Array, "*shape"], bits: int, axis: int, key: Array) -> Float[Array, "*shape"]:
    """Rounds up or down to a grid of 2^bits - 1 steps around zero, with the probabilities that keep the mean.

    One scale for each run along `axis`, max |x| / (2^(bits-1) - 1), so that nothing is clipped
    and E[result] = x exactly (Gupta et al. 2015, arXiv 1502.02551; for gradients DoReFa-Net,
    arXiv 1606.06160, equation 12, without its added noise). The grid is the bipolar one
    shifted to have a zero: gradients are mostly near it.

    Args:
      x: float numbers.
      bits: 2 to 8.
      axis: the axis that the product to come contracts.
      key: a PRNG key; the same key gives the same rounding.

    Returns:
      float32.

    Raises:
      ValueError: other bits.
    """
    check_gradient_bits(bits)
    x = x.astype(jnp.float32)
    steps = 2 ** (bits - 1) - 1
    step = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / steps
    scaled = jnp.where(step == 0, 0.0, x / jnp.where(step == 0, 1.0, step))
    rounded = jnp.floor(scaled + jax.random.uniform(key, x.shape))
    # x / step may exceed `steps` by a rounding, and then reach the next integer.
    return jnp.clip(rounded, -steps, steps) * step
