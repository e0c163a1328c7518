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

# Of int32, that sums of n numbers may fill; those of a row are below 4, and what is left of them at most 1 / 2.
_SUM_BITS = 30
# Numbers that are summed at a time; their sums are summed likewise. The more, the coarser the steps.
_RUN = 4096


@jax.custom_jvp
def fixed_point_sum(x: Float[Array, "*rows size"]) -> Float[Array, "*rows"]:
    """Sums along the last axis, the same bits in every program.

    Each number is taken apart into a multiple of a large step, whole, and one of a small step, rounded; both have
    sums that int32 holds. The large step is n / 2^28 of the power of two below the largest magnitude of n numbers,
    the small one n / 2^31 of that, n being 4096 at most: sums of magnitudes are within 3e-7 of the exact ones,
    outliers among them or not. NaN where a row holds any NaN or Inf. Differentiable.

    Args:
      x: any float dtype.

    Returns:
      float32.
    """
    x = x.astype(jnp.float32)
    size = x.shape[-1]
    if size > _RUN:
        filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % _RUN)])
        return fixed_point_sum(fixed_point_sum(filled.reshape(*x.shape[:-1], -1, _RUN)))
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    # The power of two below it, by its bits; a row of zeros or of subnormal numbers has the smallest.
    exponent = jnp.clip(jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23, 1, 253)
    unit, per_unit = (jax.lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent, 254 - exponent))
    size_bits = max(size - 1, 0).bit_length()
    per_step, steps = 2.0 ** (_SUM_BITS - 2 - size_bits), 2.0 ** (_SUM_BITS + 1 - size_bits)
    # Powers of two multiply without rounding, and what is left of a number is exact.
    scaled = x * per_unit * per_step
    whole = jnp.round(scaled)
    left = jnp.round((scaled - whole) * steps)
    large, small = (jnp.sum(part.astype(jnp.int32), axis=-1).astype(jnp.float32) for part in (whole, left))
    total = (large + small * (1 / steps)) * (1 / per_step) * unit[..., 0]
    # Not by the largest: XLA's maximum over some thousand numbers loses NaN on CPUs.
    return jnp.where(jnp.all(jnp.isfinite(x), axis=-1), total, jnp.nan)


@fixed_point_sum.defjvp
def _(primals, tangents):
    return fixed_point_sum(*primals), jnp.sum(tangents[0].astype(jnp.float32), axis=-1)


def fixed_point_mean(x: Float[Array, "*rows size"]) -> Float[Array, "*rows"]:
    """Means along the last axis, float32; see `fixed_point_sum`."""
    return fixed_point_sum(x) / max(x.shape[-1], 1)
