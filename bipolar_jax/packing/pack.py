"""Makes a `BipolarArray` from floats (`quantize`) or from integer codes (`from_codes`)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.packing.bipolar_array import BipolarArray, code_sums
from bipolar_jax.packing.words import pack_codes
from bipolar_jax.quantize.calibration import Calibration, default_calibration
from bipolar_jax.quantize.groups import check_group_size, num_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups, Scales, check_scales, default_scales
from bipolar_jax.quantize.integer_scale_search import round_to_integer_groups
from bipolar_jax.quantize.rounding import checked_rows, contracted_last, round_to_grid


def quantize(
    x: Float[Array, "*shape"],
    bits: int | BipolarFormat,
    axis: int,
    group_size: int | None = None,
    calibration: Calibration | None = None,
    scales: Scales | None = None,
) -> BipolarArray:
    """Rounds a float array to the nearest bipolar numbers and packs them.

    No gradient passes through it; for training, `fake_quant` has a straight-through gradient.

    Args:
      x: float32, bfloat16 or float16 with at least two axes: (..., k, n) or (..., n, k).
        Axes before the last two are batch axes.
      bits: 1 to 8, or a `BipolarFormat` such as `TERNARY`.
      axis: the axis that a matmul will contract; one of the last two.
      group_size: elements along `axis` that share a scale, 1 to k; the last group is
        shorter if `group_size` does not divide k. None shares one scale over the axis (per
        channel).
      calibration: how the scale of a group is chosen. "absmax" puts the largest magnitude on
        the largest value; "mse" finds the scale of least squared error, which may clip
        outliers; "minmax" spans from the smallest to the largest number and puts zero on the
        grid, by means of an offset; "absmean", for 1 bit and ternary, puts the mean magnitude
        on the largest value (XNOR-Net, arXiv 1603.05279; BitNet, arXiv 2310.11453 and
        2402.17764). None is the best for the width, see `default_calibration`. Integer groups are
        searched around the scales and offsets that it gives.
      scales: "integer" gives every group a scale of 8 bits and an offset of 8 bits below one
        float32 scale for each channel, found by a search for the least squared error, see
        `IntegerGroups`; for groups of 1 to 6 bits. "float" gives it a float32 scale, and an offset
        if the calibration is "minmax". None is "integer" for groups of 1 to 6 bits, else "float".
        Weights for float activations should be "float": Hopper's kernels for them, unlike XLA,
        do not take integer groups.

    Returns:
      A `BipolarArray` of x's shape. Groups of zeros decode to zeros.

    Raises:
      ValueError: bits outside 1..8, a dtype that is not float, NaN, Inf or magnitudes above
        2^125 in a concrete x (in a traced x the scales of their groups become NaN or Inf, or NaN
        with integer groups), an axis of size 0, or a wrong axis, group size, calibration or kind of
        scales.
    """
    if calibration is None:
        calibration = default_calibration(as_format(bits))
    rows, number_format, from_end = checked_rows(x, bits, axis, group_size, calibration, name="the array to quantize")
    if scales is None:
        scales = default_scales(number_format, group_size)
    check_scales(scales, number_format, group_size)
    return _round_and_pack(rows, number_format, from_end, group_size, calibration, scales)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _round_and_pack(rows, number_format, axis, group_size, calibration, scales) -> BipolarArray:
    rows = jax.lax.stop_gradient(rows)
    if rows.ndim > 3:  # experts of layers: one by one, so that what rounding makes on the way is one expert's
        settings = (number_format, axis, group_size, calibration, scales)
        packed = jax.lax.map(lambda one: _round_and_pack(one, *settings), rows.reshape(-1, *rows.shape[-2:]))
        return jax.tree.map(lambda leaf: leaf.reshape(*rows.shape[:-2], *leaf.shape[1:]), packed)
    if scales == "integer":
        codes, scale, groups = round_to_integer_groups(rows, number_format, group_size, calibration)
        return _pack(codes, number_format, scale, None, axis, group_size, groups)
    codes, scale, offset = round_to_grid(rows, number_format, group_size, calibration)
    return _pack(codes, number_format, scale, offset, axis, group_size)


def from_codes(
    codes: Integer[Array, "*shape"],
    bits: int | BipolarFormat,
    axis: int,
    scale: Float[Array, "*batch n scales"],
    offset: Float[Array, "*batch n scales"] | None = None,
    group_size: int | None = None,
    groups: IntegerGroups | None = None,
) -> BipolarArray:
    """Packs integer codes with their scales, such as those of another quantization format.

    Every affine integer format w = d q + m with q in 0 ... 2^bits - 1 can be represented: the
    codes are q, `scale` is d / 2 and `offset` is m + d (2^bits - 1) / 2.

    Args:
      codes: integers in 0 ... format.max_value, of shape (..., k, n) or (..., n, k).
      bits: 1 to 8, or a `BipolarFormat`.
      axis: the contracted axis, one of the last two.
      scale: number per unit of value, for each index n of the axis that is not contracted and
        each group along k; with integer groups, one for each n.
      offset: number that the value 0 stands for, in the same shape; None for 0.
      group_size: see `quantize`.
      groups: integer scales and offsets of every group, in place of float ones.

    Returns:
      A `BipolarArray` of the codes' shape.

    Raises:
      ValueError: codes that are not integers or outside the format's range (for traced codes
        the scales of their row become NaN instead), or shapes that do not fit; integer groups of
        another dtype, or with a value outside int8 (traced ones are not checked).
    """
    codes = jnp.asarray(codes)
    number_format = as_format(bits)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers, got {codes.dtype}: use bipolar_jax.quantize to round floats")
    if 0 in codes.shape:
        raise ValueError(f"codes have shape {tuple(codes.shape)}: every axis must have at least one element")
    if not isinstance(codes, jax.core.Tracer):
        with jax.core.eval_context():  # the values are known, even if the caller is traced or in a shard_map
            low, high = int(codes.min()), int(codes.max())
        if low < 0 or high > number_format.max_value:
            raise ValueError(
                f"codes span {low}..{high}, outside 0..{number_format.max_value} of {number_format.bits} bits: "
                "shift them, or ask for more bits"
            )
    rows, from_end = contracted_last(codes, axis)
    check_group_size(rows.shape[-1], group_size)
    per_group = (*rows.shape[:-1], num_groups(rows.shape[-1], None if groups is not None else group_size))
    for name, array in {"scale": scale, "offset": offset}.items():
        if array is not None and jnp.shape(array) != per_group:
            raise ValueError(f"{name} has shape {jnp.shape(array)}: these codes and groups need {per_group}")
    scale = jnp.asarray(scale, jnp.float32)
    offset = None if offset is None else jnp.asarray(offset, jnp.float32)
    if groups is not None:
        groups.check(number_format, (*rows.shape[:-1], num_groups(rows.shape[-1], group_size)))
        groups = jax.tree.map(jnp.asarray, groups)
    packed = _pack_codes_in_range(rows, scale, offset, groups, number_format, from_end, group_size)
    packed.check()
    return packed


# A program, so that an eager call passes over the codes once; within a trace it is inlined.
@functools.partial(jax.jit, static_argnums=(4, 5, 6), inline=True)
def _pack_codes_in_range(rows, scale, offset, groups, number_format, axis, group_size) -> BipolarArray:
    in_range = jnp.all((rows >= 0) & (rows <= number_format.max_value), axis=-1, keepdims=True)
    scale = jnp.where(in_range, scale, jnp.nan)
    rows = jnp.clip(rows, 0, number_format.max_value).astype(jnp.uint8)
    return _pack(rows, number_format, scale, offset, axis, group_size, groups)


def _pack(codes, number_format, scale, offset, axis, group_size, groups=None) -> BipolarArray:
    sums = code_sums(codes, group_size)
    return BipolarArray(
        planes=pack_codes(codes, number_format),
        scale=scale,
        offset=offset,
        row_sums=sums if groups is None else groups.value_sums(sums, codes.shape[-1], group_size),
        format=number_format,
        contracted_size=codes.shape[-1],
        axis=axis,
        group_size=group_size,
        groups=groups,
    )
