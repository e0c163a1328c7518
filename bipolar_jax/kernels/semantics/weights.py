"""Weights rounded and packed by given scales: the bits that the packing of every backend gives."""

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
    """The bit planes and row sums that `quantize` gives for these scales and offsets.

    Args:
      w: float32, bfloat16 or float16.
      half_steps: `half_steps_per_unit` of the scales, float32.
      offset: of every group, float32; None if all are 0.
      number_format: the grid.
      group_size: elements of a column that share a scale; None if all do.

    Returns:
      Planes, bit b of word i being element 32 i + b of the column; and the sum of codes of every group, int32.
    """
    codes = encode_rows(jnp.swapaxes(w, -1, -2), number_format, half_steps, offset, group_size)
    return pack_codes(codes, number_format), code_sums(codes, group_size)
