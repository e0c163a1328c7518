"""Unbiased stochastic rounding, for gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MIN_GRADIENT_BITS, MAX_GRADIENT_BITS = 2, 8


def check_gradient_bits(bits: int) -> None:
    """Raises ValueError unless `bits` is an integer from 2 to 8."""
    if type(bits) is not int or not MIN_GRADIENT_BITS <= bits <= MAX_GRADIENT_BITS:
        raise ValueError(
            f"gradient bits must be an integer from {MIN_GRADIENT_BITS} to {MAX_GRADIENT_BITS}, got {bits!r}: "
            "None leaves gradients float"
        )


def stochastic_round(x: Float[Array, "*shape"], bits: int, axis: int, key: Array) -> Float[Array, "*shape"]:
    """Rounds up or down to a symmetric grid at random, so that the expected result is x.

    The grid has 2^bits - 1 levels, the integers of magnitude up to 2^(bits-1) - 1 times a step.
    Each slice along `axis` has its own step, max |x| / (2^(bits-1) - 1), so that nothing is
    clipped (Gupta et al. 2015, arXiv 1502.02551; for gradients DoReFa-Net, arXiv 1606.06160,
    equation 12, without its added noise). The grid contains zero because most gradients are
    near zero.

    Args:
      x: any float dtype.
      bits: 2 to 8.
      axis: the axis that the following product contracts.
      key: a PRNG key; the same key gives the same rounding.

    Returns:
      float32, in x's shape.

    Raises:
      ValueError: bits outside 2..8.
    """
    check_gradient_bits(bits)
    x = x.astype(jnp.float32)
    steps = 2 ** (bits - 1) - 1
    step = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / steps
    scaled = jnp.where(step == 0, 0.0, x / jnp.where(step == 0, 1.0, step))
    rounded = jnp.floor(scaled + jax.random.uniform(key, x.shape, jnp.float32))
    # x / step may be rounded to above `steps`, from where it could be rounded up to the next integer.
    return jnp.clip(rounded, -steps, steps) * step
