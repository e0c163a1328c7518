"""Sums and means of floats that do not depend on the order in which numbers are added up.

A compiler adds up in another order wherever a sum stands in another program: weights that are
packed in a training step would get other scales than the same weights packed for inference, in
the last bit, and some of them other codes. Integers have no such order, so floats are rounded to
fixed point first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A sum of n numbers below 4 in units of 2^(ceil(log2 n) - _FRACTION_BITS) is below 2^30, and fits int32.
_FRACTION_BITS = 28


@jax.custom_jvp
def fixed_point_sum(x: Float[Array, "*rows size"]) -> Float[Array, "*rows"]:
    """Sums along the last axis, the same bits in every program.

    Numbers are rounded to multiples of size / 2^28 of the power of two below the largest magnitude
    of their row; sums of 16384 magnitudes are within some 2e-6 of the exact ones. NaN where a row
    holds any NaN or Inf. Differentiable.

    Args:
      x: any float dtype.

    Returns:
      float32.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # The power of two below it, by its bits; a row of zeros or of subnormal numbers has the smallest.
    exponent = jnp.clip(jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23, 1, 253)
    unit, per_unit = (jax.lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent, 254 - exponent))
    fraction = 2.0 ** (_FRACTION_BITS - (x.shape[-1] - 1).bit_length())
    # Powers of two multiply without rounding.
    rounded = jnp.round(x * per_unit * fraction).astype(jnp.int32)
    total = jnp.sum(rounded, axis=-1).astype(jnp.float32) * (1 / fraction) * unit[..., 0]
    # Not by the largest: XLA's maximum over some thousand numbers loses NaN on CPUs.
    return jnp.where(jnp.all(jnp.isfinite(x), axis=-1), total, jnp.nan)


@fixed_point_sum.defjvp
def _(primals, tangents):
    return fixed_point_sum(*primals), jnp.sum(tangents[0].astype(jnp.float32), axis=-1)


def fixed_point_mean(x: Float[Array, "*rows size"]) -> Float[Array, "*rows"]:
    """Means along the last axis, float32; see `fixed_point_sum`."""
    return fixed_point_sum(x) / x.shape[-1]
