"""Sums and means of floats that do not depend on the order of summation.

XLA chooses the order of a float sum anew in every program. Weights packed in a training step would
then get scales that differ in the last bit from those of the same weights packed for inference, and
some codes would differ. Integer sums are exact in any order, so floats are rounded to fixed point
and added as int32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Bits of int32 that a sum may use: a term is below 4 times `unit`, a residual at most half a coarse step.
_SUM_BITS = 30
# Numbers in one int32 sum; longer rows are summed in chunks, and then the sums. More terms need coarser steps.
_CHUNK = 4096


@jax.custom_jvp
def fixed_point_sum(x: Float[Array, "*rows size"]) -> Float[Array, "*rows"]:
    """Sums along the last axis; every program gives the same bits.

    Each number is split into a multiple of a coarse step and a residual, which is rounded to a multiple of a fine
    step. Both multiples are summed in int32 without overflow. For n numbers (at most 4096 at a time, n rounded up to
    a power of two) whose largest magnitude is at least the power of two u, the coarse step is u n / 2^28 and the fine
    one n / 2^31 of that. The error is at most 3e-7 of the sum of magnitudes, with or without outliers.

    Differentiable; the derivative is that of a float sum.

    Args:
      x: any float dtype.

    Returns:
      float32; NaN for rows with NaN or Inf.
    """
    x = x.astype(jnp.float32)
    size = x.shape[-1]
    if size > _CHUNK:
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % _CHUNK)])
        return fixed_point_sum(fixed_point_sum(padded.reshape(*x.shape[:-1], -1, _CHUNK)))
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    # `unit` is the power of two at or below `largest`, from its exponent bits; 2^-126 for zeros and subnormals.
    exponent = jnp.clip(jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23, 1, 253)
    unit, per_unit = (jax.lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent, 254 - exponent))
    size_bits = max(size - 1, 0).bit_length()
    per_step, steps = 2.0 ** (_SUM_BITS - 2 - size_bits), 2.0 ** (_SUM_BITS + 1 - size_bits)
    # Products with powers of two and the difference scaled - coarse are exact.
    scaled = x * per_unit * per_step
    coarse = jnp.round(scaled)
    fine = jnp.round((scaled - coarse) * steps)
    coarse_sum, fine_sum = (jnp.sum(terms.astype(jnp.int32), axis=-1).astype(jnp.float32) for terms in (coarse, fine))
    total = (coarse_sum + fine_sum * (1 / steps)) * (1 / per_step) * unit[..., 0]
    # `largest` cannot tell: XLA's maximum over thousands of numbers drops NaN on CPUs.
    return jnp.where(jnp.all(jnp.isfinite(x), axis=-1), total, jnp.nan)


@fixed_point_sum.defjvp
def _(primals, tangents):
    return fixed_point_sum(*primals), jnp.sum(tangents[0].astype(jnp.float32), axis=-1)


def fixed_point_mean(x: Float[Array, "*rows size"]) -> Float[Array, "*rows"]:
    """Means along the last axis, float32, by `fixed_point_sum`; 0 for rows of size 0."""
    return fixed_point_sum(x) / max(x.shape[-1], 1)


def sums_with_values(
    x: Float[Array, "*rows size"], values: Int[Array, "*rows size"], largest: int
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Sums of x times values, and of squared values, along the last axis; every program gives the same bits.

    As `fixed_point_sum`, but in one pass, because the largest term is known beforehand. XLA computes several sums in
    one loop only if they are one reduction of several operands.

    Args:
      x: float32, magnitudes up to about `largest`.
      values: int32, magnitudes up to `largest`.
      largest: at most 255.

    Returns:
      float32 sums, undefined for rows with NaN or Inf.
    """
    size = x.shape[-1]
    if size > _CHUNK:
        chunked = [
            jnp.pad(terms, [(0, 0)] * (x.ndim - 1) + [(0, -size % _CHUNK)]).reshape(*x.shape[:-1], -1, _CHUNK)
            for terms in (x, values)
        ]
        products, squares = sums_with_values(*chunked, largest)
        return fixed_point_sum(products), fixed_point_sum(squares)
    size_bits = max(size - 1, 0).bit_length()
    # One bit more than the largest product has: x may be rounded to above `largest`.
    per_step = 2.0 ** (_SUM_BITS - size_bits - (2 * largest * largest).bit_length())
    steps = 2.0 ** (_SUM_BITS + 1 - size_bits)
    scaled = x * values.astype(jnp.float32) * jnp.float32(per_step)
    coarse = jnp.round(scaled)
    fine = jnp.round((scaled - coarse) * jnp.float32(steps))
    zero = jnp.int32(0)
    coarse_sum, fine_sum, squares = jax.lax.reduce(
        (coarse.astype(jnp.int32), fine.astype(jnp.int32), values * values),
        (zero, zero, zero),
        lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
        (x.ndim - 1,),
    )
    total = coarse_sum.astype(jnp.float32) + fine_sum.astype(jnp.float32) * jnp.float32(1 / steps)
    return total * jnp.float32(1 / per_step), squares.astype(jnp.float32)


def power_of_two_at_or_below(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of normal float32 numbers above 0, from their exponent bits."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000, jnp.float32)
