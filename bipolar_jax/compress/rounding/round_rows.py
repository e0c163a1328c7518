"""`round_rows`: weights to codes and their grid, by the Hessian of the inputs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.compress.rounding.descent import descend
from bipolar_jax.compress.rounding.gptq import gptq, with_damping
from bipolar_jax.compress.rounding.grid_search import search_grid
from bipolar_jax.compress.rounding.grids import FittedGrid, FreeGrid, IntegerGrid, ZeroPointGrid
from bipolar_jax.compress.rounding.method import RoundedRows, Rounding
from bipolar_jax.compress.rounding.targets import asymmetric_target
from bipolar_jax.format import as_format
from bipolar_jax.quantize.calibration import flush_scale
from bipolar_jax.quantize.groups import check_group_size, split_groups, valid_mask
from bipolar_jax.quantize.integer_scale_search import power_of_two_at_or_below, search_integer_groups
from bipolar_jax.quantize.precision import Precision
from bipolar_jax.quantize.rounding import check_finite, check_float


def round_rows(
    rows: Float[Array, "n k"],
    hessian: Float[Array, "k k"] | None,
    precision: Precision | str,
    method: Rounding = Rounding(),  # noqa: B008 - frozen
    cross: Float[Array, "k k"] | None = None,
) -> RoundedRows:
    """Rounds weights so that (w - q) H (w - q)^T, the squared error of the layer's outputs, becomes small.

    First the grid: a search for the least squared error of the weights, for integer groups around the float one. Then
    GPTQ on that grid. Then `descent_passes` times a refit of the grid, and a pass of coordinate descent over the
    codes; and a last refit. Compiled once for each shape, precision and method. Rows are independent of each other.

    Args:
      rows: the weights, an output each, as float32, bfloat16 or float16.
      hessian: sum x x^T over the inputs of the layer, in float32; its scale does not matter. None for "nearest".
      precision: bits, groups and kind of scales; its calibration is not used.
      method: see `Rounding`.
      cross: sum x~ x^T, x~ the inputs that the Hessian was summed of, and x those of the float model; for an
        `asymmetry` above 0.

    Returns:
      Codes and grid; a row of zeros decodes to zeros.

    Raises:
      ValueError: shapes that do not fit, NaN or Inf (not in traced arrays), a missing Hessian or `cross`, symmetric
        integer groups.
    """
    precision = Precision.of(precision)
    rows = jnp.asarray(rows)
    check_float(rows, "the rows to round")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"rows to round have shape {rows.shape}: expected [outputs, inputs], at least one of each")
    check_finite(rows, "the rows to round")
    k = rows.shape[1]
    check_group_size(k, precision.group_size)
    if precision.scales == "integer" and method.grid == "symmetric":
        raise ValueError(
            f'grid "symmetric" is not one of integer groups, as of {precision}: use "free" or "zero_point"'
        )
    needs_hessian = method.algorithm != "nearest" or method.weighted_grid
    for name, array, needed in (("hessian", hessian, needs_hessian), ("cross", cross, method.asymmetry > 0)):
        if needed and array is None:
            raise ValueError(f"{method} needs {name}, got None")
        if array is not None:
            if array.shape != (k, k):
                raise ValueError(f"{name} has shape {array.shape}: rows of {k} inputs need {(k, k)}")
            check_finite(array, name)
    if not needs_hessian:
        hessian = None
    return _round_rows(rows, hessian, cross if method.asymmetry > 0 else None, precision, method)


@functools.partial(jax.jit, static_argnames=("precision", "method"))
def _round_rows(
    rows: Float[Array, "n k"],
    hessian: Float[Array, "k k"] | None,
    cross: Float[Array, "k k"] | None,
    precision: Precision,
    method: Rounding,
) -> RoundedRows:
    size = precision.group_size or rows.shape[1]
    rows = rows.astype(jnp.float32)
    # In units of a power of two for each row, so that no square overflows or vanishes.
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    unit = jnp.where(largest > 0, power_of_two_at_or_below(largest), 1.0)
    rows = (rows / unit).T
    importance = None
    if hessian is not None:
        # In units of its mean diagonal.
        mean = jnp.mean(jnp.diagonal(hessian))
        per_mean = 1 / jnp.where(mean > 0, mean, 1.0)
        hessian = per_mean / 2 * (hessian + hessian.T)
        importance = split_groups(jnp.diagonal(hessian), size)
        damped = with_damping(hessian, method.damping)
        if cross is not None:
            rows = asymmetric_target(rows, damped, per_mean * cross - hessian, method.asymmetry)
        hessian = damped
    find_grid = _integer_grid if precision.scales == "integer" else _float_grid
    grid = find_grid(rows, importance if method.weighted_grid else None, precision, method)
    rounded = _codes_on(grid, rows, hessian, size, method)
    offset = None if rounded.offset is None else rounded.offset * unit
    return dataclasses.replace(rounded, scale=flush_scale(rounded.scale * unit), offset=offset)


def _float_grid(
    rows: Float[Array, "k n"], weights: Float[Array, "groups size"] | None, precision: Precision, method: Rounding
) -> FreeGrid | ZeroPointGrid:
    number_format, size = as_format(precision.w_bits), precision.group_size or len(rows)
    grouped, inside = split_groups(rows.T, size), valid_mask(len(rows), size)
    step, base, zero = search_grid(grouped, inside, number_format, method.grid, weights)
    if zero is None:
        return FreeGrid(step.T, base.T, number_format.max_value)
    symmetric = method.grid == "symmetric" or number_format.bits == 1
    return ZeroPointGrid(step.T, zero.T, number_format.max_value, symmetric)


def _integer_grid(
    rows: Float[Array, "k n"], weights: Float[Array, "groups size"] | None, precision: Precision, method: Rounding
) -> IntegerGrid:
    number_format, size = as_format(precision.w_bits), precision.group_size
    grouped, inside = split_groups(rows.T, size), valid_mask(len(rows), size)
    keeps_zero = method.grid == "zero_point" and number_format.bits > 1
    kind = "zero_point" if keeps_zero else "free"
    step, base, _ = search_grid(grouped, inside, number_format, kind, weights)
    scale, offset = step / 2, base + number_format.max_value * step / 2
    row_scale, groups = search_integer_groups(
        grouped, inside, number_format, scale, offset, keeps_zero=keeps_zero, weights=weights
    )
    s, o = (a.T.astype(jnp.float32) for a in (groups.scale, groups.offset))
    return IntegerGrid(row_scale[:, 0], s, o, number_format.max_value, keeps_zero)


def _codes_on(
    grid: FittedGrid, rows: Float[Array, "k n"], hessian: Float[Array, "k k"] | None, size: int, method: Rounding
) -> RoundedRows:
    """Codes on the grid, and the grid fitted to them."""
    groups = jnp.arange(len(rows)) // size
    if method.algorithm == "nearest":
        return grid.with_codes(grid.affine().of(groups).codes(rows).astype(jnp.uint8))
    codes = gptq(rows, hessian, grid.affine(), groups, act_order=method.act_order, block=method.block)
    if method.descent_passes == 0:
        return grid.with_codes(codes)

    def refit_and_descend(_, state):
        grid, codes = state
        grid = grid.refit(rows, codes, hessian, size)
        return grid, descend(rows, codes, hessian, grid.affine(), groups, method.block)

    grid, codes = jax.lax.fori_loop(0, method.descent_passes, refit_and_descend, (grid, codes))
    return grid.refit(rows, codes, hessian, size).with_codes(codes)
