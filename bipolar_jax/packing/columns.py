"""Matrices with the same inputs as one: their columns lie side by side."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bipolar_jax.packing.bipolar_numbers import BipolarNumbers
from bipolar_jax.packing.fields import TILE_ROWS
from bipolar_jax.packing.prepared_array import PreparedArray

# The axes of a leaf, counted from the end, along which columns, or tiles of them, lie.
_COLUMNS, _TILES = -2, -5


def fill_tiles(stack: BipolarNumbers) -> bool:
    """Whether the columns of each matrix end where a tile of a `PreparedArray` does; others have no tiles."""
    return not isinstance(stack, PreparedArray) or stack.row_sums.shape[_COLUMNS] % TILE_ROWS == 0


def side_by_side(stack: BipolarNumbers) -> BipolarNumbers:
    """One matrix with the columns of all matrices of a stack, those of the first one first.

    Of a gated `PreparedArray` the gates of all matrices come first, then the values of all, as gated activations take
    them.

    Args:
      stack: with one leading axis, packed along the axis before the last.

    Raises:
      ValueError: another number of axes, or columns that do not fill tiles.
    """
    if stack.ndim != 3 or stack.axis != -2:
        raise ValueError(f"expected a stack of matrices [k, n] that are packed along k, got {stack}")
    if not isinstance(stack, PreparedArray):
        return jax.tree.map(lambda leaf: _merged(leaf, _COLUMNS), stack)
    if not fill_tiles(stack):
        raise ValueError(f"the columns of {stack} do not fill tiles of {TILE_ROWS}: prepare the joined array")
    tiled = {name: getattr(stack, name) for name in ("words", "terms")}
    rows = {name: getattr(stack, name) for name in ("scale", "row_sums", "offset", "number_sums")}
    tiled = {name: None if leaf is None else _merged(leaf, _TILES) for name, leaf in tiled.items()}
    rows = {name: None if leaf is None else _merged_rows(leaf, stack.gated) for name, leaf in rows.items()}
    return dataclasses.replace(stack, **tiled, **rows)


def _merged(leaf: Array, axis: int) -> Array:
    """The first axis merged into another one."""
    at = leaf.ndim + axis
    moved = jnp.moveaxis(leaf, 0, at - 1)
    return moved.reshape(*moved.shape[: at - 1], -1, *moved.shape[at + 1 :])


def _merged_rows(leaf: Array, gated: bool) -> Array:
    if not gated:
        return _merged(leaf, _COLUMNS)
    halves = leaf.reshape(leaf.shape[0], 2, -1, leaf.shape[-1])
    return jnp.swapaxes(halves, 0, 1).reshape(-1, leaf.shape[-1])
