"""Calibration: the scale and the offset of every group of numbers."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.fixed_point import fixed_point_sum, sums_with_values
from bipolar_jax.quantize.groups import along_last

Calibration = Literal["absmax", "mse", "minmax", "absmean"]

# For scales in this range 1 / (2 scale) is a normal float32. Smaller scales become 0, so that their group
# decodes to zeros; larger ones become Inf, which reaches everything computed from the group.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**125

# Twice as many lower the squared error by less than 0.1% up to four bits, and by 1% at eight.
_NUM_SHRINK_FACTORS = 24


def default_calibration(number_format: BipolarFormat) -> Calibration:
    """The calibration that is used where none is named.

    "minmax" from 3 bits up: zero lies on its grid, which language models need where an outlier sets the scale. At 2
    bits and for ternary "mse", at 1 bit "absmean", which is the least-squares scale too: a span would be wasted on
    outliers.
    """
    if number_format.bits == 1:
        return "absmean"
    return "mse" if number_format.ternary or number_format.bits == 2 else "minmax"


def check_calibration(calibration: str, number_format: BipolarFormat) -> None:
    """Raises ValueError if `calibration` is not a `Calibration`, or not one for this format."""
    if calibration not in get_args(Calibration):
        raise ValueError(f"calibration must be one of {', '.join(get_args(Calibration))}, got {calibration!r}")
    if calibration == "absmean" and number_format.bits > 1 and not number_format.ternary:
        raise ValueError(
            f'calibration "absmean" is for 1 bit and ternary weights, got {number_format.bits} bits: '
            'use "mse", which may also clip outliers'
        )


def calibrate(
    x: Float[Array, "*rows groups size"],
    valid: Bool[np.ndarray, "groups size"],
    number_format: BipolarFormat,
    calibration: Calibration,
) -> tuple[Float[Array, "*rows groups"], Float[Array, "*rows groups"] | None]:
    """Computes the scale of every group, and its offset for "minmax".

    Args:
      x: float32, split into groups; 0 where `valid` is False.
      valid: False for the zeros that pad the last group.
      number_format: the grid to fit.
      calibration: "absmax" puts the largest magnitude on the largest value; "mse" finds the
        scale of least squared error, which may clip outliers; "minmax" spans from the smallest
        to the largest number and puts zero on the grid, by means of an offset; "absmean", for
        1 bit and ternary, puts the mean magnitude on the largest value.

    Returns:
      float32 scales (0 for groups of zeros, NaN for groups with NaN), and float32 offsets or
      None.
    """
    if calibration == "minmax":
        scale, zero_value = spanning_grid(x, number_format)
        return scale, -scale * zero_value.astype(jnp.float32)
    if calibration == "absmean":
        # The padding is zero and adds nothing to the sum.
        lengths = valid.sum(axis=-1).astype(np.float32)
        mean = fixed_point_sum(jnp.abs(x)) / along_last(lengths * number_format.max_value, x.ndim - 1)
        return flush_scale(mean), None
    scale = absmax_scale(x, number_format)
    if calibration == "mse":
        scale = _least_squares_scale(x, valid, number_format, scale)
    return scale, None


def absmax_scale(x: Float[Array, "*rows size"], number_format: BipolarFormat) -> Float[Array, "*rows"]:
    """max |x| / max_value over the last axis, float32; NaN for rows with NaN."""
    x = x.astype(jnp.float32)
    return flush_scale(_propagate_nan(x, jnp.max(jnp.abs(x), axis=-1)) / number_format.max_value)


def spanning_grid(
    x: Float[Array, "*rows size"], number_format: BipolarFormat
) -> tuple[Float[Array, "*rows"], Int[Array, "*rows"]]:
    """Fits the grid scale * (v - v0) to the range of each row; the grid contains zero.

    The range is from min(x, 0) to max(x, 0); v0 is rounded to the grid. Without an offset the
    grid has no zero: where an outlier sets a large scale, every small number becomes +-scale,
    and weights and tokens of language models have such outliers. One bit has two values, too
    few for a zero, so its grid stays symmetric. Of a format with a `span` below 1 the grid spans
    that part of the range. Of a `symmetric` one the range is from -max|x| to max|x|, and v0 is the value of its
    `code_offset`, 1, whatever x.

    Returns:
      float32 scales as in `absmax_scale`; int32 v0, the value that zero is encoded as.
    """
    return grid_between(*row_extremes(x), number_format)


def row_extremes(x: Float[Array, "*rows size"]) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """min(x, 0) and max(x, 0) of each row, float32; the second is NaN for rows with NaN."""
    x = x.astype(jnp.float32)
    high = _propagate_nan(x, jnp.maximum(jnp.max(x, axis=-1), 0))
    return jnp.minimum(jnp.min(x, axis=-1), 0), high


def grid_between(
    low: Float[Array, "*rows"], high: Float[Array, "*rows"], number_format: BipolarFormat
) -> tuple[Float[Array, "*rows"], Int[Array, "*rows"]]:
    """`spanning_grid` of rows with these `row_extremes`, which parts of a row can find one by one."""
    span, top = number_format.span, number_format.max_value
    if number_format.bits == 1:
        return flush_scale(flush_scale(jnp.maximum(high, -low) / top) * span), jnp.zeros(low.shape, jnp.int32)
    # Halves are subtracted because high - low may exceed the largest float32.
    half_range = jnp.maximum(high, -low) if number_format.symmetric else high / 2 - low / 2
    # With a span one product, as XLA makes of the division by a constant: kernels multiply once.
    scale = flush_scale(half_range / top if span == 1 else half_range * (span / top))
    if number_format.symmetric:
        return scale, jnp.full(low.shape, number_format.value_shift, jnp.int32)
    zero_code = jnp.clip(jnp.floor(0.5 - (low * span) * half_steps_per_unit(scale)), 0, top)
    return scale, number_format.values(zero_code.astype(jnp.int32))


def _propagate_nan(x: Float[Array, "*rows size"], extreme: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """NaN for rows with NaN, else `extreme`: XLA's maximum over thousands of numbers drops NaN on CPUs."""
    return jnp.where(jnp.any(jnp.isnan(x), axis=-1), jnp.nan, extreme)


def half_steps_per_unit(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / (2 scale), an argument of `BipolarFormat.encode`; 0 where the scale is 0."""
    return jnp.where(scale == 0, 0.0, 0.5 / jnp.where(scale == 0, 1.0, scale))


def flush_scale(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Replaces scales below SMALLEST_SCALE by 0 and above LARGEST_SCALE by Inf; keeps NaN."""
    return jnp.where(scale < SMALLEST_SCALE, 0.0, jnp.where(scale > LARGEST_SCALE, jnp.inf, scale))


def _least_squares_scale(
    x: Float[Array, "*rows groups size"],
    valid: Bool[np.ndarray, "groups size"],
    number_format: BipolarFormat,
    largest: Float[Array, "*rows groups"],
) -> Float[Array, "*rows groups"]:
    """Searches the scale of least squared error among scales of at most `largest`.

    Each candidate scale gives codes, and these codes a fitted scale: for fixed values v the
    squared error sum (x - s v)^2 is least at s = <x, v> / <v, v>, where it is
    <x, x> + s (s <v, v> - 2 <x, v>). The term <x, x> is the same for all candidates and is
    left out. Encoding again at the fitted scale cannot increase the error.

    Args:
      x, valid, number_format: as for `calibrate`.
      largest: `absmax_scale` of the groups; candidates are this times factors up to 1.

    Returns:
      float32 scales.
    """

    # In units of `largest`, so that no product overflows.
    inside = along_last(valid, x.ndim)
    unit = 2 * x * half_steps_per_unit(largest)[..., None]

    def try_factor(best, shrink):
        best_error, best_scale = best
        codes = number_format.encode(unit, 0.5 / shrink)
        values = jnp.where(inside, number_format.values(codes), 0)
        xv, vv = sums_with_values(unit, values, number_format.max_value)
        fitted = jnp.where(vv == 0, shrink, xv / jnp.where(vv == 0, 1.0, vv))
        error = fitted * (fitted * vv - 2 * xv)
        better = error < best_error
        return (jnp.where(better, error, best_error), jnp.where(better, fitted, best_scale)), None

    start = (jnp.full_like(largest, jnp.inf), jnp.ones_like(largest))
    # The best scale at 1 bit is the mean of |x|: about 1/4 of the largest among a few hundred normal numbers,
    # less for heavy tails. At 8 bits it is close to `largest`.
    smallest = 0.1 ** (2 / (number_format.bits + 1))
    shrink_factors = np.geomspace(1.0, smallest, _NUM_SHRINK_FACTORS, dtype=np.float32)
    (_, fitted), _ = jax.lax.scan(try_factor, start, jnp.asarray(shrink_factors))
    return flush_scale(fitted * largest)
