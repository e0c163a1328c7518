"""The search for integer groups of least squared error: for numbers, and for the codes of float groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.calibration import SMALLEST_SCALE, Calibration, calibrate, half_steps_per_unit
from bipolar_jax.quantize.fixed_point import fixed_point_sum, power_of_two_at_or_below, sums_with_values
from bipolar_jax.quantize.groups import along_last, group_lengths, in_blocks, split_groups, valid_mask
from bipolar_jax.quantize.integer_groups import LARGEST_VALUE, SMALLEST_VALUE, IntegerGroups, largest_scale
from bipolar_jax.quantize.rounding import encode_rows

# Scales of a row that are tried, as factors of the smallest one on which no group has to be clipped.
_ROW_FACTORS = np.linspace(1.0, 0.55, 16, dtype=np.float32)
# The same where codes are kept, whose error takes one formula for each group; and how often the best one is fitted.
_ROW_FACTORS_OF_CODES = np.linspace(1.5, 0.5, 41, dtype=np.float32)
_ROW_SCALE_FITS = 3
# What is added to the nearest integer scale of a group.
_NEIGHBORS = np.array([0, -1, 1], np.float32)
_OFFSET_FITS = 2


def round_to_integer_groups(
    x: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int, calibration: Calibration
) -> tuple[UInt8[Array, "*rows k"], Float[Array, "*rows 1"], IntegerGroups]:
    """Searches the integer groups of every row, and rounds to the nearest value.

    For each of 16 row scales S, every group takes the best of three integers s around that of its float grid, which
    `calibration` gives. S is the one of least squared error of its row. Then every group tries three s again. If the
    float grid contains zero ("minmax"), so does that of the integers: o = -s z, with z the code of zero. Otherwise o
    puts the middles of the grids together, and is fitted to the codes in the end: for fixed codes the error is least
    at o = mean(x / S - s u).

    Args:
      x: any float dtype.
      number_format: 1 to 6 bits.
      group_size: numbers that share s and o.
      calibration: see `calibrate`.

    Returns:
      uint8 codes; float32 row scales, NaN for rows with NaN or Inf; the groups.
    """
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    valid = valid_mask(x.shape[-1], group_size)

    def of_block(block):
        grouped = split_groups(block, group_size)
        scale, offset = calibrate(grouped, valid, number_format, calibration)
        return search_integer_groups(grouped, valid, number_format, scale, offset, keeps_zero=offset is not None)

    found = in_blocks(of_block, rows)
    row_scale, groups = jax.tree.map(lambda a: a.reshape(*x.shape[:-1], a.shape[-1]), found)
    return encode_integer_groups(x, number_format, row_scale, groups, group_size), row_scale, groups


def encode_integer_groups(
    x: Float[Array, "*rows k"],
    number_format: BipolarFormat,
    row_scale: Float[Array, "*rows 1"],
    groups: IntegerGroups,
    group_size: int,
) -> UInt8[Array, "*rows k"]:
    """Codes of the values nearest to x / S."""
    scale, offset = groups.float_grid(row_scale, number_format)
    return encode_rows(x, number_format, half_steps_per_unit(scale), offset, group_size)


def range_of_integer_groups(
    x: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int, calibration: Calibration
) -> tuple[Float[Array, "*rows 1"], IntegerGroups]:
    """The row scales and integer groups that span the float grids of a calibration; for training, without a search."""
    grouped = split_groups(x.astype(jnp.float32), group_size)
    scale, offset = calibrate(grouped, valid_mask(x.shape[-1], group_size), number_format, calibration)
    zero_code, top, unclipped = _limits(scale, offset, number_format)
    s = jnp.clip(jnp.ceil(2 * scale * _inverse(unclipped)), 1, top)
    o = _nearest_offset(jnp.zeros_like(scale), s, number_format) if zero_code is None else -s * zero_code
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    return _integers(jnp.where(finite, unclipped, jnp.nan), s, o, number_format)


def integer_groups_of_codes(
    mean_code: Float[Array, "*batch n groups"],
    variance: Float[Array, "*batch n groups"],
    scale: Float[Array, "*batch n groups"],
    offset: Float[Array, "*batch n groups"] | None,
    number_format: BipolarFormat,
    k: int,
    group_size: int,
) -> tuple[Float[Array, "*batch n 1"], IntegerGroups, Float[Array, "*batch"]]:
    """The integer groups on which the same codes have the numbers nearest to those of float groups.

    A float group has the numbers a u + b, with a = 2 scale and b = offset - W scale. Where its n codes have the mean m
    and the variance v, the squared error of S (s u + o) is n ((d m + e)^2 + d^2 v), with d = S s - a and e = S o - b.
    For each S, a group takes the best of three integers s around a / S, and o = (a m + b) / S - s m, rounded.

    S is the best of: 41 scales around the smallest one on which all grids fit int8; the largest a of the row divided by
    each possible s, one of which is exact if all grids are of the form S (s u + o); and the S of least squares for the
    best integers, three times. Where such integers stand in a product: LiquidGEMM, arXiv 2509.01229; QServe, arXiv
    2405.04532.

    Args:
      mean_code, variance: of the codes of every group, see `moments_of_codes`.
      scale, offset: of the float groups.
      number_format: their grid, of 1 to 6 bits.
      k: codes of a row.
      group_size: codes of a group.

    Returns:
      float32 row scales, 0 for rows of zeros, NaN where the row has a scale below zero, NaN or Inf; the groups; the
      squared error of each matrix, divided by the sum of its squared numbers.
    """
    largest, top = number_format.max_value, largest_scale(number_format)
    a, b = 2 * scale, -largest * scale
    b = b if offset is None else offset + b
    needed = _least_row_scale(a, b, largest)
    # XLA's maximum on CPUs may drop NaN.
    valid = jnp.all((scale >= 0) & jnp.isfinite(b), axis=-1, keepdims=True) & jnp.isfinite(needed)
    needed = jnp.where(valid & (needed >= 4 * SMALLEST_SCALE), needed, 0.0)

    # Below, grids are in units of a power of two for each row, so that squares do not overflow and grids stay exact.
    unit = jnp.where(needed > 0, power_of_two_at_or_below(needed), 1.0)
    a, b, needed = a / unit, b / unit, needed / unit
    largest_a = jnp.max(a, axis=-1, keepdims=True)
    n = along_last(jnp.asarray(group_lengths(k, group_size), jnp.float32), a.ndim)
    m, v = mean_code, variance
    mean = a * m + b

    def error_of(row_scale, s, o):
        d, e = row_scale * s - a, row_scale * o - b
        return (d * m + e) ** 2 + d**2 * v

    def over_groups(mean_of_group):
        return fixed_point_sum(n * mean_of_group)[..., None]

    def least_squares(s, o):
        mean_value = s * m + o
        return over_groups(mean * mean_value + a * s * v) * _inverse(over_groups(mean_value**2 + s**2 * v))

    def try_row_scale(best, candidate):
        """Of `candidate`, a factor of `needed` and a divisor of `largest_a`, one is 0; both are for a fit."""
        factor, divisor = candidate
        _, _, s, o = best
        # The barrier keeps XLA from multiplying with the reciprocal, which rounds twice.
        divisors = jax.lax.optimization_barrier(jnp.full_like(largest_a, jnp.maximum(divisor, 1)))
        row_scale = jnp.where(divisor > 0, largest_a / divisors, factor * needed)
        row_scale = jnp.where(factor + divisor > 0, row_scale, least_squares(s, o))
        row_scale = jnp.where(row_scale > 0, row_scale, 1.0)
        found = (jnp.full_like(a, jnp.inf), jnp.ones_like(a), jnp.zeros_like(a))
        for neighbor in _NEIGHBORS:
            s = jnp.clip(jnp.round(a / row_scale) + neighbor, 1, top)
            o = _in_range(mean / row_scale - s * m, s, number_format)
            found = _better(found, (error_of(row_scale, s, o), s, o))
        error, s, o = found
        return _better(best, (over_groups(error), row_scale, s, o)), None

    factors = [(factor, 0) for factor in _ROW_FACTORS_OF_CODES]
    shares = [(0, divisor) for divisor in range(1, top + 1)]
    candidates = jnp.asarray(factors + shares + [(0, 0)] * _ROW_SCALE_FITS, jnp.float32)
    start = (jnp.full_like(needed, jnp.inf), jnp.ones_like(needed), jnp.ones_like(a), jnp.zeros_like(a))
    (error, row_scale, s, o), _ = jax.lax.scan(try_row_scale, start, candidates)

    row_scale = jnp.where(valid, jnp.where(needed > 0, row_scale * unit, 0.0), jnp.nan)
    weight = jnp.where(needed > 0, unit, 0.0)
    weight = (weight * _inverse(jnp.max(weight, axis=-2, keepdims=True))) ** 2
    error = jnp.sum(jnp.where(valid, jnp.where(needed > 0, weight * error, 0.0), jnp.nan), axis=(-1, -2))
    squares = jnp.sum(jnp.where(needed > 0, weight * over_groups(mean**2 + a**2 * v), 0.0), axis=(-1, -2))
    return *_integers(row_scale, s, o, number_format), error * _inverse(squares)


def moments_of_codes(
    codes: UInt8[Array, "*rows k"], group_size: int
) -> tuple[Float[Array, "*rows groups"], Float[Array, "*rows groups"]]:
    """The mean and the variance of the codes of every group."""
    inside = along_last(valid_mask(codes.shape[-1], group_size), codes.ndim + 1)
    grouped = split_groups(codes, group_size).astype(jnp.int32)
    count = jnp.asarray(inside.sum(axis=-1), jnp.float32)
    near_mean = jnp.round(jnp.sum(grouped, axis=-1).astype(jnp.float32) / count).astype(jnp.int32)
    beside_it = jnp.where(inside, grouped - near_mean[..., None], 0)
    shift, squares = (jnp.sum(terms, axis=-1).astype(jnp.float32) / count for terms in (beside_it, beside_it**2))
    return near_mean.astype(jnp.float32) + shift, jnp.maximum(squares - shift**2, 0.0)


def search_integer_groups(
    x: Float[Array, "rows groups size"],
    valid: Bool[np.ndarray, "groups size"],
    number_format: BipolarFormat,
    scale: Float[Array, "rows groups"],
    offset: Float[Array, "rows groups"] | None,
    *,
    keeps_zero: bool,
    weights: Float[Array, "groups size"] | None = None,
) -> tuple[Float[Array, "rows 1"], IntegerGroups]:
    """The row scale and the groups of least squared error around float grids; see `round_to_integer_groups`.

    Args:
      x: float32, split into groups.
      valid: False for padding.
      number_format: 1 to 6 bits.
      scale, offset: of the float grids; offset None for symmetric ones.
      keeps_zero: whether the offsets put zero on the grids, where it stays; else offsets are fitted.
      weights: of the squared errors, above 0; None for equal ones.

    Returns:
      Row scales, NaN for rows with NaN or Inf; the groups.
    """
    largest = number_format.max_value
    zero_code, top, unclipped = _limits(scale, offset if keeps_zero else None, number_format)
    if offset is not None and not keeps_zero:
        unclipped = _least_row_scale(2 * scale, offset - largest * scale, largest)
        unclipped = jnp.where(unclipped < 4 * SMALLEST_SCALE, 0.0, unclipped)

    # Below, grids are in units of `unclipped`, and the numbers of a group in units of its largest magnitude.
    magnitude = jnp.max(jnp.abs(x), axis=-1)
    has_numbers = (magnitude >= SMALLEST_SCALE) & (unclipped > 0)
    inside = along_last(valid, 3)
    relative = jnp.where(has_numbers, magnitude, 1.0)
    numbers = jnp.where(has_numbers[..., None], x / relative[..., None], 0.0)
    per_unit = _inverse(unclipped)
    relative = jnp.where(has_numbers, relative * per_unit, 1.0)
    lengths = along_last(valid.sum(axis=-1).astype(np.float32), 2)
    if weights is not None:
        weights = jnp.where(valid, weights, 0.0)[None]
        lengths = jnp.sum(weights, axis=-1)
    mean = (fixed_point_sum(numbers) if weights is None else jnp.sum(weights * numbers, axis=-1)) / lengths * relative
    step = 2 * scale * per_unit
    middle_of_floats = jnp.zeros_like(step) if offset is None or keeps_zero else offset * per_unit

    def encoded(factor, s, o):
        middle, half_steps = jax.lax.optimization_barrier((factor * (o + s * (largest / 2)) / relative, relative / s))
        codes = number_format.encode(numbers - middle[..., None], (half_steps / factor)[..., None])
        return jnp.where(inside, codes, 0)

    def squared_error(factor, s, o):
        """Of every group, less the sum of x^2, which is the same for all grids."""
        codes = encoded(factor, s, o).astype(jnp.int32)
        values = jnp.where(inside, s[..., None].astype(jnp.int32) * codes + o[..., None].astype(jnp.int32), 0)
        if weights is None:
            with_numbers, squares = sums_with_values(numbers, values, -SMALLEST_VALUE)
        else:
            floats = values.astype(jnp.float32)
            with_numbers, squares = (jnp.sum(weights * floats * other, axis=-1) for other in (numbers, floats))
        return factor * (factor * squares - 2 * relative * with_numbers)

    def best_neighbor(factor, nearest, middle, offset_fits):
        """The best (error, s, o) of the groups for one row scale; `middle` of their grids, in row scales."""

        def fit_offset(_, candidate):
            s, o = candidate
            codes = encoded(factor, s, o)
            if weights is None:
                sums = jnp.sum(codes, axis=-1, dtype=jnp.int32).astype(jnp.float32)
            else:
                sums = jnp.sum(weights * codes.astype(jnp.float32), axis=-1)
            mean_code = sums / lengths
            return s, _in_range(mean / factor - jax.lax.optimization_barrier(s * mean_code), s, number_format)

        def try_neighbor(best, neighbor):
            s = jnp.clip(nearest + neighbor, 1, top)
            if zero_code is not None:
                o = -s * zero_code
            else:
                s, o = jax.lax.fori_loop(0, offset_fits, fit_offset, (s, _nearest_offset(middle, s, number_format)))
            return _better(best, (squared_error(factor, s, o), s, o)), None

        start = (jnp.full_like(step, jnp.inf), jnp.ones_like(step), jnp.zeros_like(step))
        return jax.lax.scan(try_neighbor, start, jnp.asarray(_NEIGHBORS))[0]

    def try_factor(best, factor):
        """A factor 0 stands for the best one, whose groups are refined."""
        _, best_factor, s, o = best
        refines = factor == 0
        factor = jnp.where(refines, best_factor, factor)
        nearest = jnp.where(refines, s, jnp.round(step / factor))
        middle = jnp.where(refines, o + s * (largest / 2), middle_of_floats / factor)  # unless zero decides
        error, s, o = best_neighbor(factor, nearest, middle, jnp.where(refines, _OFFSET_FITS, 0))
        return _better(best, (fixed_point_sum(error)[:, None], factor, s, o)), None

    # One loop for the factors and the refinement, because compiling its body takes longer than running it.
    start = (jnp.full_like(unclipped, jnp.inf), jnp.ones_like(unclipped), jnp.ones_like(step), jnp.zeros_like(step))
    (_, factor, s, o), _ = jax.lax.scan(try_factor, start, jnp.asarray([*_ROW_FACTORS, 0], jnp.float32))

    finite = jnp.all(jnp.isfinite(x), axis=(-1, -2))[:, None]
    return _integers(jnp.where(finite, unclipped * factor, jnp.nan), s, o, number_format)


def _integers(
    row_scale: Float[Array, "*rows 1"],
    s: Float[Array, "*rows groups"],
    o: Float[Array, "*rows groups"],
    number_format: BipolarFormat,
) -> tuple[Float[Array, "*rows 1"], IntegerGroups]:
    """The groups as integers; in rows of scale 0 the code `code_offset`, which all numbers get, has the value 0."""
    o = jnp.where(row_scale == 0, -number_format.code_offset, o)
    return row_scale, IntegerGroups(s.astype(jnp.uint8), o.astype(jnp.int8))


def _limits(
    scale: Float[Array, "*rows groups"], offset: Float[Array, "*rows groups"] | None, number_format: BipolarFormat
) -> tuple[Float[Array, "*rows groups"] | None, Float[Array, "*rows groups"], Float[Array, "*rows 1"]]:
    """What the float grids allow.

    Returns:
      The code z of zero on every group's grid, None for symmetric grids; the largest s for which all values fit int8;
      the smallest row scale on which such an s is as large as the grid's step.
    """
    largest, zero_code = number_format.max_value, None
    top = jnp.full_like(scale, largest_scale(number_format))
    if offset is not None and number_format.bits > 1:  # one bit has no zero
        z = jnp.where(scale > 0, (largest - offset / jnp.where(scale > 0, scale, 1.0)) / 2, number_format.code_offset)
        zero_code = jnp.clip(jnp.round(z), 0, largest)
        below, above = (jnp.maximum(codes, 1) for codes in (zero_code, largest - zero_code))
        top = jnp.minimum(top, jnp.floor(jnp.minimum(-SMALLEST_VALUE / below, LARGEST_VALUE / above)))
    unclipped = jnp.max(2 * scale / top, axis=-1, keepdims=True)
    # Scales of groups on the same grid are at least a quarter of this.
    return zero_code, top, jnp.where(unclipped < 4 * SMALLEST_SCALE, 0.0, unclipped)


def _least_row_scale(
    step: Float[Array, "*rows groups"], base: Float[Array, "*rows groups"], largest: int
) -> Float[Array, "*rows 1"]:
    """The smallest row scale on which all grids step * u + base of a row fit int8."""
    needed = jnp.maximum(step * (largest / (LARGEST_VALUE - SMALLEST_VALUE)), base / SMALLEST_VALUE)
    return jnp.max(jnp.maximum(needed, (base + largest * step) / LARGEST_VALUE), axis=-1, keepdims=True)


def _inverse(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _nearest_offset(
    middle: Float[Array, "*rows groups"], s: Float[Array, "*rows groups"], number_format: BipolarFormat
) -> Float[Array, "*rows groups"]:
    """The integer offset that puts the middle of the grid nearest to `middle`, if the values then fit int8."""
    return _in_range(middle - s * (number_format.max_value / 2), s, number_format)


def _in_range(
    o: Float[Array, "*rows groups"], s: Float[Array, "*rows groups"], number_format: BipolarFormat
) -> Float[Array, "*rows groups"]:
    return jnp.clip(jnp.round(o), SMALLEST_VALUE, LARGEST_VALUE - number_format.max_value * s)


def _better(best: tuple[Array, ...], candidate: tuple[Array, ...]) -> tuple[Array, ...]:
    """Where the error, the first array, is smaller, the candidate's arrays."""
    smaller = candidate[0] < best[0]
    return tuple(jnp.where(smaller, new, old) for new, old in zip(candidate, best, strict=True))
