"""Rounding to the bipolar grid in floating point, with a straight-through gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.quantize.calibration import Calibration, default_calibration
from bipolar_jax.quantize.groups import spread_groups
from bipolar_jax.quantize.integer_groups import Scales, check_scales, default_scales
from bipolar_jax.quantize.integer_scale_search import encode_integer_groups, range_of_integer_groups
from bipolar_jax.quantize.rounding import checked_rows, from_grid, round_to_grid


def fake_quant(
    x: Float[Array, "*shape"],
    bits: int | BipolarFormat,
    axis: int,
    group_size: int | None = None,
    calibration: Calibration | None = None,
    clip_gradient: bool = True,
    scales: Scales | None = None,
) -> Float[Array, "*shape"]:
    """Rounds to the bipolar grid and back: `quantize(...).dequantize()` without packing, and without a search.

    The gradient is straight-through (Bengio et al. 2013, arXiv 1308.3432): 1 for numbers within
    the grid's range or up to half a step beyond its ends, 0 for clipped numbers (the hard-tanh
    estimator of arXiv 1602.02830). Only `calibration` "mse" and "absmean" clip. The scales are
    treated as constants.

    Args:
      x: float32, bfloat16 or float16, at least two axes.
      bits: 1 to 8, or a `BipolarFormat`.
      axis: the contracted axis, one of the last two; scales are shared along it.
      group_size: elements that share a scale; None for the whole axis.
      calibration: see `quantize`.
      clip_gradient: False makes the gradient 1 for clipped numbers too.
      scales: as for `quantize`, by default integer for groups of 1 to 6 bits; but integer ones
        are not searched: their grids span the float ones of the calibration.

    Returns:
      x's shape and dtype.

    Raises:
      ValueError: as `quantize`.
    """
    if calibration is None:
        calibration = default_calibration(as_format(bits))
    x = jnp.asarray(x)
    if x.size == 0 and x.ndim >= 2:  # an empty batch of activations
        return x
    rows, number_format, from_end = checked_rows(x, bits, axis, group_size, calibration, name="the input of fake_quant")
    if scales is None:
        scales = default_scales(number_format, group_size)
    check_scales(scales, number_format, group_size)
    return _fake_quant(rows, number_format, from_end, group_size, calibration, clip_gradient, scales)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6), inline=True)
def _fake_quant(rows, number_format, axis, *options):
    rounded = _straight_through(rows, number_format, *options)
    return rounded if axis == -1 else jnp.swapaxes(rounded, -1, -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4, 5))
def _straight_through(x, number_format, group_size, calibration, clip_gradient, scales):
    codes, scale, offset = _rounded(x, number_format, group_size, calibration, scales)
    return from_grid(codes, number_format, scale, offset, group_size).astype(x.dtype)


@_straight_through.defjvp
def _(number_format, group_size, calibration, clip_gradient, scales, primals, tangents):
    (x,), (tangent,) = primals, tangents
    k = x.shape[-1]
    codes, scale, offset = _rounded(x, number_format, group_size, calibration, scales)
    rounded = from_grid(codes, number_format, scale, offset, group_size).astype(x.dtype)
    if not clip_gradient:
        return rounded, tangent
    reach = spread_groups(scale * (number_format.max_value + 1), k, group_size)
    center = 0.0 if offset is None else spread_groups(offset, k, group_size)
    inside = jnp.abs(x.astype(jnp.float32) - center) <= reach
    return rounded, jnp.where(inside, tangent, 0)


def _rounded(x, number_format, group_size, calibration, scales):
    """Codes, scales and offsets of float groups; those of integer groups are on the same grid."""
    if scales == "float":
        return round_to_grid(x, number_format, group_size, calibration)
    row_scale, groups = range_of_integer_groups(x, number_format, group_size, calibration)
    codes = encode_integer_groups(x, number_format, row_scale, groups, group_size)
    return codes, *groups.float_grid(row_scale, number_format)
