"""Weights rounded and packed by given scales: what every backend's packing gives."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_array import code_sums
from bipolar_jax.packing.words import pack_codes
from bipolar_jax.quantize.rounding import encode_rows


def pack_weights(
    w: Float[Array, "k n"],
    half_steps: Float[Array, "n groups"],
    offset: Float[Array, "n groups"] | None,
    number_format: BipolarFormat,
    group_size: int | None,
) -> tuple[UInt32[Array, "planes n words"], Int[Array, "n groups"]]:
    """Planes and row sums of `quantize`.

    Args:
      w: float32, bfloat16 or float16.
      half_steps: `half_steps_per_unit` of the scales.
      offset: that of every group, or None.
      number_format: the grid.
      group_size: numbers of a column that share a scale; None if all do.
    """
    codes = encode_rows(jnp.swapaxes(w, -1, -2), number_format, half_steps, offset, group_size)
    return pack_codes(codes, number_format), code_sums(codes, group_size)
