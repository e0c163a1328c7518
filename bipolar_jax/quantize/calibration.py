"""How scales are chosen: from the numbers of one group to its scale and offset."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.fixed_point import fixed_point_sum

Calibration = Literal["absmax", "mse", "minmax", "absmean"]

# The scales whose half reciprocal is a normal float32. A group with a smaller one counts
# as zero; a larger one becomes Inf, which shows in everything computed from it.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**125

_NUM_SHRINK_FACTORS = 48


def check_calibration(calibration: str, number_format: BipolarFormat) -> None:
    """Raises ValueError unless `calibration` is one of those below, and one for this format."""
    if calibration not in get_args(Calibration):
        raise ValueError(f"calibration must be one of {', '.join(get_args(Calibration))}, got {calibration!r}")
    if calibration == "absmean" and number_format.bits > 1 and not number_format.ternary:
        raise ValueError(
            f'calibration "absmean" is for 1 bit and ternary weights, got {number_format.bits} bits: '
            'use "mse", whose scale also follows the bulk of the numbers'
        )


def calibrate(
    x: Float[Array, "*rows groups size"],
    valid: Bool[np.ndarray, "groups size"],
    number_format: BipolarFormat,
    calibration: Calibration,
) -> tuple[Float[Array, "*rows groups"], Float[Array, "*rows groups"] | None]:
    """Scale, and offset or None, of every group.

    Args:
      x: float32, zero wherever `valid` is False.
      valid: which elements are numbers of the caller's.
      number_format: the grid to fit.
      calibration: "absmax" puts the largest magnitude on the largest value; "mse"
        minimizes the squared error over a range of scales, so that outliers may be
        clipped; "minmax" spans from the smallest to the largest number with zero on the
        grid, which takes an offset; "absmean", for 1 bit and ternary, puts the mean
        magnitude on the largest value.

    Returns:
      float32 scales (0 for groups of zeros; NaN if the group has NaN) and offsets.
    """
    if calibration == "minmax":
        scale, zero_value = spanning_grid(x, number_format)
        return scale, -scale * zero_value.astype(jnp.float32)
    if calibration == "absmean":
        # The zeros that fill the last group add nothing.
        lengths = valid.sum(axis=-1).astype(np.float32)
        return flush_scale(fixed_point_sum(jnp.abs(x)) / (lengths * number_format.max_value)), None
    scale = absmax_scale(x, number_format)
    if calibration == "mse":
        scale = _least_squares_scale(x, valid, number_format, scale)
    return scale, None


def absmax_scale(x: Float[Array, "*rows size"], number_format: BipolarFormat) -> Float[Array, "*rows"]:
    """max |x| / max_value over the last axis, float32."""
    x = x.astype(jnp.float32)
    return flush_scale(_keep_nan(x, jnp.max(jnp.abs(x), axis=-1)) / number_format.max_value)


def spanning_grid(
    x: Float[Array, "*rows size"], number_format: BipolarFormat
) -> tuple[Float[Array, "*rows"], Int[Array, "*rows"]]:
    """The grid scale * (v - v0) that spans exactly from the smallest to the largest number, zero included.

    The odd grid alone has no zero: where an outlier sets the scale it turns all the small
    numbers beside it into +-scale. Language models have such weights and such tokens. One
    bit has no room for a zero and stays symmetric.

    Returns:
      Scales, float32, as `absmax_scale`; and v0, the value that zero has, int32.
    """
    x = x.astype(jnp.float32)
    if number_format.bits == 1:
        return absmax_scale(x, number_format), jnp.zeros(x.shape[:-1], jnp.int32)
    low = jnp.minimum(jnp.min(x, axis=-1), 0)
    high = jnp.maximum(jnp.max(x, axis=-1), 0)
    # Halved before they are subtracted: high - low may exceed the largest float32.
    scale = flush_scale(_keep_nan(x, high / 2 - low / 2) / number_format.max_value)
    zero_code = jnp.clip(jnp.floor(0.5 - low * half_steps_per_unit(scale)), 0, number_format.max_value)
    return scale, number_format.values(zero_code.astype(jnp.int32))


def _keep_nan(x: Float[Array, "*rows size"], extreme: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """NaN for rows that hold any: XLA's maximum over some thousand numbers loses them on CPUs."""
    return jnp.where(jnp.any(jnp.isnan(x), axis=-1), jnp.nan, extreme)


def half_steps_per_unit(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / (2 scale), what `BipolarFormat.encode` multiplies by; 0 where the scale is 0."""
    return jnp.where(scale == 0, 0.0, 0.5 / jnp.where(scale == 0, 1.0, scale))


def flush_scale(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """0 and Inf in place of scales outside SMALLEST_SCALE ... LARGEST_SCALE; NaN stays."""
    return jnp.where(scale < SMALLEST_SCALE, 0.0, jnp.where(scale > LARGEST_SCALE, jnp.inf, scale))


def _least_squares_scale(
    x: Float[Array, "*rows groups size"],
    valid: Bool[np.ndarray, "groups size"],
    number_format: BipolarFormat,
    largest: Float[Array, "*rows groups"],
) -> Float[Array, "*rows groups"]:
    """Best of the shrink factors; for its codes, the scale that least squares gives.

    For fixed values v the squared error sum (x - s v)^2 is least at s = <x, v> / <v, v>;
    it is then <x, x> + s (s <v, v> - 2 <x, v>), of which the first term is the same for
    all and is left out. Rounding anew at the fitted scale can only lessen it.
    """

    # In units of `largest`, so that no product can overflow.
    unit = 2 * x * half_steps_per_unit(largest)[..., None]

    def attempt(best, shrink):
        best_error, best_scale = best
        codes = number_format.encode(unit, 0.5 / shrink)
        values = jnp.where(valid, number_format.values(codes), 0).astype(jnp.float32)
        xv, vv = fixed_point_sum(unit * values), fixed_point_sum(values * values)
        fitted = jnp.where(vv == 0, shrink, xv / jnp.where(vv == 0, 1.0, vv))
        error = fitted * (fitted * vv - 2 * xv)
        better = error < best_error
        return (jnp.where(better, error, best_error), jnp.where(better, fitted, best_scale)), None

    start = (jnp.full_like(largest, jnp.inf), jnp.ones_like(largest))
    # One bit wants the mean of |x|, about 1/4 of the largest of a few hundred normal numbers
    # and less of long tails; eight bits want nearly all of it.
    smallest = 0.1 ** (2 / (number_format.bits + 1))
    shrink_factors = np.geomspace(1.0, smallest, _NUM_SHRINK_FACTORS, dtype=np.float32)
    (_, fitted), _ = jax.lax.scan(attempt, start, jnp.asarray(shrink_factors))
    return flush_scale(fitted * largest)
