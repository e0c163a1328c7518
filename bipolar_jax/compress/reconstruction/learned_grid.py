"""Rounded weights as functions of numbers that learn: their codes, and changes of their grid. Arrays alone.

A layer has rows of weights, an output each; groups of a row share a step and a base: the code u stands for
step * u + base. Changes of the grid are relative and begin at 0, and latent codes are in steps of the grid, so that one
learning rate suits all layers, groups and numbers of bits. Always:

- `numbers(start, LearnedRows.of(start, ...))` are the numbers of the packed array, whatever the float weights are;
- `numbers` are those of `packed`, up to the rounding of a float32 sum: integer groups are integers while they learn.

The derivatives by changes of steps and bases are those of the numbers themselves, with the codes as they are; those by
latent codes, and by integers of groups, are straight-through (arXiv 1308.3432).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray, from_codes
from bipolar_jax.quantize.calibration import flush_scale
from bipolar_jax.quantize.groups import spread_groups
from bipolar_jax.quantize.integer_groups import LARGEST_VALUE, SMALLEST_VALUE, IntegerGroups
from bipolar_jax.quantize.straight_through import straight_through

# A latent code starts within so many steps of its code, where the float weight is further away: rounding had moved it
# on purpose, and one that starts at the border changes its code with the first update.
INSIDE = 0.3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StartGrid:
    """The grid that learning starts from.

    Attributes:
      step: of each group; with integer groups s, as floats.
      base: what the code 0 stands for; with integer groups o.
      row_scale: S of integer groups; None of float ones.
      largest: the largest code. An operand of programs, which all numbers of bits share.
    """

    step: Float[Array, "n groups"]
    base: Float[Array, "n groups"]
    row_scale: Float[Array, "n 1"] | None
    largest: Float[Array, ""]

    @classmethod
    def of(cls, packed: BipolarArray) -> StartGrid:
        """That of an array whose axis before the last is contracted."""
        largest = jnp.float32(packed.format.max_value)
        if packed.groups is not None:
            step, base = (array.astype(jnp.float32) for array in (packed.groups.scale, packed.groups.offset))
            return cls(step, base, packed.scale, largest)
        base = -packed.scale * largest
        return cls(2 * packed.scale, base if packed.offset is None else base + packed.offset, None, largest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedRows:
    """What learns of one layer.

    Attributes:
      codes: latent ones, whose nearest integers are the codes.
      step: change of each step, in parts of it; None where integers of groups do not learn.
      shift: change of each base, in steps; None where zero stays at its place of the grid.
      row_scale: change of the scale of each row, in parts of it, with integer groups; None of float ones.
    """

    codes: Float[Array, "n k"]
    step: Float[Array, "n groups"] | None
    shift: Float[Array, "n groups"] | None
    row_scale: Float[Array, "n 1"] | None

    @classmethod
    def of(
        cls,
        packed: BipolarArray,
        floats: Float[Array, "k n"],
        start: StartGrid,
        *,
        learn_groups: bool,
        keeps_zero: bool,
    ) -> LearnedRows:
        """Those of a packed array: its codes, moved towards the float weights by up to `INSIDE` steps.

        Args:
          packed: the array.
          floats: the weights before they were rounded.
          start: the array's grid.
          learn_groups: whether integers of groups learn, too.
          keeps_zero: whether the number that is zero keeps its place on the grid.
        """
        codes, k = packed.codes().astype(jnp.float32), packed.shape[-2]
        unit = 1 if start.row_scale is None else start.row_scale
        step, base = (spread_groups(unit * array, k, packed.group_size) for array in (start.step, start.base))
        exact = jnp.where(step > 0, (floats.T.astype(jnp.float32) - base) / jnp.where(step > 0, step, 1), codes)
        latent = jnp.clip(exact, codes - INSIDE, codes + INSIDE)
        learns = learn_groups or start.row_scale is None
        change = jnp.zeros_like(start.step) if learns else None
        shift = change if learns and not keeps_zero else None
        return cls(latent, change, shift, None if start.row_scale is None else jnp.zeros_like(start.row_scale))

    def within_cells(self, largest: Float[Array, ""]) -> LearnedRows:
        """With latent codes within half a step of the grid's codes, from where they can come back."""
        return dataclasses.replace(self, codes=jnp.clip(self.codes, -0.5, largest + 0.5))


def numbers(start: StartGrid, learned: LearnedRows, group_size: int | None) -> Float[Array, "n k"]:
    """The rounded weights, differentiable in what learns.

    With float groups (1 + step) * (start.step * (u + shift) + start.base); with integer ones
    start.row_scale * (1 + row_scale) * (s * u + o).
    """
    step, base = _grid(start, learned)
    k = learned.codes.shape[-1]
    codes = straight_through(_rounded(learned.codes, 0.0, start.largest), learned.codes)
    return spread_groups(step, k, group_size) * codes + spread_groups(base, k, group_size)


def _grid(start: StartGrid, learned: LearnedRows) -> tuple[Float[Array, "n groups"], Float[Array, "n groups"]]:
    """Steps and bases as they have become."""
    if start.row_scale is None:
        growth = 1 + learned.step
        base = start.base if learned.shift is None else start.base + start.step * learned.shift
        return growth * start.step, growth * base
    step, base = _integers(start, learned)
    row_scale = start.row_scale * (1 + learned.row_scale)
    return row_scale * step, row_scale * base


def _integers(start: StartGrid, learned: LearnedRows) -> tuple[Float[Array, "n groups"], Float[Array, "n groups"]]:
    """s and o as floats: the nearest integers within their limits, differentiated as if they were not rounded."""
    if learned.step is None:
        return start.step, start.base
    exact = start.step * (1 + learned.step)
    step = straight_through(_rounded(exact, 1.0, (LARGEST_VALUE - SMALLEST_VALUE) // start.largest), exact)
    codes_of_base = start.base / start.step
    exact = step * (codes_of_base if learned.shift is None else codes_of_base + learned.shift)
    highest = LARGEST_VALUE - start.largest * jax.lax.stop_gradient(step)
    return step, straight_through(_rounded(exact, float(SMALLEST_VALUE), highest), exact)


def _rounded(x: Float[Array, "*shape"], low: Float[Array, "..."] | float, high: Float[Array, "..."]) -> Array:
    return jnp.clip(jnp.round(jax.lax.stop_gradient(x)), low, high)


def packed(
    start: StartGrid, learned: LearnedRows, number_format: BipolarFormat, group_size: int | None, *, has_offset: bool
) -> BipolarArray:
    """The rounded weights as an array whose axis before the last is contracted; `has_offset`: of float groups."""
    codes: UInt8[Array, "n k"] = _rounded(learned.codes, 0.0, start.largest).astype(jnp.uint8)
    if start.row_scale is not None:
        step, base = _integers(start, learned)
        groups = IntegerGroups(step.astype(jnp.uint8), base.astype(jnp.int8))
        scale = flush_scale(start.row_scale * (1 + learned.row_scale))
        return from_codes(codes.T, number_format, -2, scale, None, group_size, groups)
    step, base = _grid(start, learned)
    scale = flush_scale(step / 2)
    offset = base + scale * start.largest if has_offset else None
    return from_codes(codes.T, number_format, -2, scale, offset, group_size)
