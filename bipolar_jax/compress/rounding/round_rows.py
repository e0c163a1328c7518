"""`round_rows`: weights to codes and their grid, by the Hessian of the inputs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.compress.programs import Run, call
from bipolar_jax.compress.rounding.affine_grid import AffineGrid, NestedGrid
from bipolar_jax.compress.rounding.descent import descend
from bipolar_jax.compress.rounding.gptq import gptq, with_damping
from bipolar_jax.compress.rounding.grid_search import Codes, search_grid
from bipolar_jax.compress.rounding.grids import FittedGrid, FreeGrid, IntegerGrid, ZeroPointGrid
from bipolar_jax.compress.rounding.method import Grid, RoundedRows, Rounding
from bipolar_jax.compress.rounding.targets import asymmetric_target
from bipolar_jax.format import TERNARY, BipolarFormat, as_format
from bipolar_jax.quantize.calibration import flush_scale
from bipolar_jax.quantize.fixed_point import power_of_two_at_or_below
from bipolar_jax.quantize.groups import check_group_size, in_blocks, split_groups, valid_mask
from bipolar_jax.quantize.integer_groups import Scales
from bipolar_jax.quantize.integer_scale_search import search_integer_groups
from bipolar_jax.quantize.precision import Precision
from bipolar_jax.quantize.rounding import check_finite, check_float

# Of inputs in the search for a grid, in units of their mean: even inputs that were never active count a little.
_WEIGHTS = 1e-3, 1e3


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
        integer groups, nested precisions that do not fit.
    """
    precision = Precision.of(precision)
    rows = jnp.asarray(rows)
    check_float(rows, "the rows to round")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"rows to round have shape {rows.shape}: expected [outputs, inputs], at least one of each")
    check_finite(rows, "the rows to round")
    k = rows.shape[1]
    check_group_size(k, precision.group_size)
    method.check(precision)
    for name, array, needed in (("hessian", hessian, method.needs_hessian), ("cross", cross, method.asymmetry > 0)):
        if needed and array is None:
            raise ValueError(f"{method} needs {name}, got None")
        if array is not None:
            if array.shape != (k, k):
                raise ValueError(f"{name} has shape {array.shape}: rows of {k} inputs need {(k, k)}")
            check_finite(array, name)
    return round_in_stages(rows, hessian, cross, precision, method)


def round_in_stages(
    rows: Float[Array, "n k"],
    hessian: Float[Array, "k k"] | None,
    cross: Float[Array, "k k"] | None,
    precision: Precision,
    method: Rounding,
    run: Run = call,
) -> RoundedRows:
    """`round_rows` of checked arguments: one program after the other.

    The long programs, GPTQ and descent, know of a precision its grid alone, spread over all inputs: all precisions and
    group sizes of one shape share them.

    Args:
      rows, hessian, cross, precision, method: as `round_rows`.
      run: calls a program, or compiles it, see `compress.programs`.
    """
    hessian, cross = hessian if method.needs_hessian else None, cross if method.asymmetry > 0 else None
    size = precision.group_size or rows.shape[1]
    turns = {"act_order": method.act_order, "block": method.block}

    def of_inputs(grid: FittedGrid) -> AffineGrid:
        """The grid of every input, whose shape tells nothing of groups."""
        return dataclasses.replace(run(_of_inputs, grid, size=size, k=len(targets)), largest=grid.largest)

    targets, hessian, diagonal, unit = run(
        _targets, rows, hessian, cross, method.damping, method.asymmetry if cross is not None else None
    )
    number_format, kind = as_format(precision.w_bits), method.grid
    if number_format.bits == 1 and kind == "zero_point":  # one bit has no zero
        kind = "free" if precision.scales == "integer" else "symmetric"
    dropped = (0, *(number_format.bits - bits for bits in method.nested))
    found = run(
        _grid,
        targets,
        diagonal if method.weighted_grid else None,
        Codes.of(number_format, dropped[-1]),
        size=size,
        kind=kind,
        scales=precision.scales,
        ternary=number_format.ternary,
        dropped=dropped,
        decay=method.nested_decay,
    )
    grid = _grid_of(found, number_format.max_value, precision.scales, kind)
    if method.algorithm == "nearest":
        return run(_result, grid, run(_nearest, targets, of_inputs(grid)), unit)
    if method.nested:
        options = {"largest": grid.largest, "dropped": dropped, "decay": method.nested_decay}
        targets, nested = run(_nested, targets, grid, size=size, **options)
        codes = run(_gptq, targets, hessian, nested, **turns)
        for _ in range(method.descent_passes):
            codes = run(_descend, targets, codes, hessian, nested, block=method.block)
        return run(_result, grid, codes, unit)
    codes = run(_gptq, targets, hessian, of_inputs(grid), **turns)
    for index in range(method.descent_passes + 1 if method.descent_passes else 0):
        refitted = run(_refit, targets, codes, hessian, grid, size=size)
        grid = dataclasses.replace(refitted, largest=grid.largest)
        if index < method.descent_passes:
            codes = run(_descend, targets, codes, hessian, of_inputs(grid), block=method.block)
    return run(_result, grid, codes, unit)


@jax.jit
def _targets(
    rows: Float[Array, "n k"],
    hessian: Float[Array, "k k"] | None,
    cross: Float[Array, "k k"] | None,
    damping: float,
    asymmetry: float | None,
) -> tuple[Float[Array, "k n"], Float[Array, "k k"] | None, Float[Array, "k"] | None, Float[Array, "n 1"]]:
    """What is rounded, inputs first; the damped Hessian and its diagonal without damping, of mean 1; units of rows.

    Units are powers of two, so that no square overflows or vanishes.
    """
    rows = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    unit = jnp.where(largest > 0, power_of_two_at_or_below(largest), 1.0)
    rows = (rows / unit).T
    if hessian is None:
        return rows, None, None, unit
    mean = jnp.mean(jnp.diagonal(hessian))
    per_mean = 1 / jnp.where(mean > 0, mean, 1.0)
    hessian = per_mean / 2 * (hessian + hessian.T)
    damped = with_damping(hessian, damping)
    if cross is not None:
        rows = asymmetric_target(rows, damped, per_mean * cross - hessian, asymmetry)
    return rows, damped, jnp.diagonal(hessian), unit


@functools.partial(jax.jit, static_argnames=("size", "kind", "scales", "ternary", "dropped", "decay"))
def _grid(
    rows: Float[Array, "k n"],
    weights: Float[Array, "k"] | None,
    codes: Codes,
    size: int,
    kind: Grid,
    scales: Scales,
    ternary: bool,
    dropped: tuple[int, ...],
    decay: float,
) -> list[Float[Array, "..."]]:
    """The grid of least squared error, before codes are known: the arrays of `_grid_of`."""
    inside = valid_mask(len(rows), size)
    if weights is not None:
        weights = split_groups(jnp.clip(weights, *_WEIGHTS), size)
    number_format = TERNARY if ternary else _SomeBits(2, largest=codes.largest)

    def find(block: Float[Array, "rows k"]) -> tuple[Array, ...]:
        x = split_groups(block, size)
        step, base, zero = search_grid(x, inside, codes, kind, weights, dropped, decay)
        if scales == "float":
            return (step, base) if zero is None else (step, zero)
        offset = base + codes.largest * step / 2
        row_scale, groups = search_integer_groups(
            x, inside, number_format, step / 2, offset, keeps_zero=zero is not None, weights=weights
        )
        return row_scale[:, 0], groups.scale.astype(jnp.float32), groups.offset.astype(jnp.float32)

    return [array.T for array in in_blocks(find, rows.T)]


@dataclasses.dataclass(frozen=True, eq=False)
class _SomeBits(BipolarFormat):
    """A format whose largest code is an operand of a compiled program; of its bits nothing else is known."""

    largest: Int[Array, ""] | int = 0

    @property
    def max_value(self) -> Int[Array, ""] | int:
        """The largest code."""
        return self.largest


def _grid_of(found: list[Float[Array, "..."]], largest: int, scales: Scales, kind: Grid) -> FittedGrid:
    """The grid of these arrays; its largest code is a Python number, so that programs do not depend on it."""
    if scales == "integer":
        return IntegerGrid(*found, largest, kind == "zero_point")
    return FreeGrid(*found, largest) if kind == "free" else ZeroPointGrid(*found, largest, kind == "symmetric")


@functools.partial(jax.jit, static_argnames=("size", "k"))
def _of_inputs(grid: FittedGrid, size: int, k: int) -> AffineGrid:
    """The grid of every input, [k, n]; `size` inputs are a group."""
    return grid.affine().of(jnp.arange(k) // size)


@functools.partial(jax.jit, static_argnames=("size", "largest", "dropped", "decay"))
def _nested(
    rows: Float[Array, "k n"], grid: FittedGrid, size: int, largest: int, dropped: tuple[int, ...], decay: float
) -> tuple[Float[Array, "k precisions n"], NestedGrid]:
    """Targets of all precisions, that of all planes first, and the grids of every input."""
    affine = grid.affine()
    targets = jnp.broadcast_to(rows[:, None], (len(rows), len(dropped), rows.shape[1]))
    middle = jnp.stack([grid.middle(d) for d in dropped], axis=-2)
    grids = NestedGrid(affine.step, affine.base, middle, largest, dropped, decay)
    return targets, grids.of(jnp.arange(len(rows)) // size)


@jax.jit
def _nearest(rows: Float[Array, "k n"], grid: AffineGrid) -> UInt8[Array, "k n"]:
    return grid.codes(rows).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("act_order", "block"))
def _gptq(
    rows: Float[Array, "k *precisions n"],
    hessian: Float[Array, "k k"],
    grid: AffineGrid | NestedGrid,
    act_order: bool,
    block: int,
) -> UInt8[Array, "k n"]:
    return gptq(rows, hessian, grid, jnp.arange(len(rows)), act_order=act_order, block=block)


@functools.partial(jax.jit, static_argnames="size")
def _refit(
    rows: Float[Array, "k n"], codes: UInt8[Array, "k n"], hessian: Float[Array, "k k"], grid: FittedGrid, size: int
) -> FittedGrid:
    return grid.refit(rows, codes, hessian, size)


@functools.partial(jax.jit, static_argnames="block")
def _descend(
    rows: Float[Array, "k *precisions n"],
    codes: UInt8[Array, "k n"],
    hessian: Float[Array, "k k"],
    grid: AffineGrid | NestedGrid,
    block: int,
) -> UInt8[Array, "k n"]:
    return descend(rows, codes, hessian, grid, jnp.arange(len(rows)), block)


@jax.jit
def _result(grid: FittedGrid, codes: UInt8[Array, "k n"], unit: Float[Array, "n 1"]) -> RoundedRows:
    rounded = grid.with_codes(codes)
    offset = None if rounded.offset is None else rounded.offset * unit
    return dataclasses.replace(rounded, scale=flush_scale(rounded.scale * unit), offset=offset)
