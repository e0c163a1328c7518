"""Rows of a packed table, by index."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from bipolar_jax.ops.compiled import as_array
from bipolar_jax.ops.explicit_sharding import mesh_axes, with_out_sharding
from bipolar_jax.packing import BipolarArray, BlockScaledArray, PreparedArray, UnpackedArray

Table = BipolarArray | BlockScaledArray | UnpackedArray | PreparedArray


def lookup(
    table: Table,
    ids: Integer[Array, "*batch"],
    dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "*batch d"]:
    """Decodes the rows `ids` of a table; the other rows stay packed.

    Args:
      table: logical shape (rows, d), packed along the last axis.
      ids: row indices; one below 0 or past the end gives a row of NaN.
      dtype: of the result, float.

    Raises:
      ValueError: ids that are not integers; a table that is not packed, without two axes, or not packed along the last
        one, or a `PreparedArray` that is gated or has float scales of groups; a dtype that is not float.
    """
    ids = as_array(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"rows are float numbers, got dtype {jnp.dtype(dtype).name}: ask for float32, say, and round")
    if not isinstance(table, Table):
        raise ValueError(
            f"the table must be a BipolarArray, got {type(table).__name__}: make one with bipolar_jax.quantize"
        )
    if table.ndim != 2 or table.axis != -1:
        raise ValueError(
            f"a table of shape {table.shape} packed along axis {table.axis} has no rows to look up: "
            "it must have two axes and be quantized with axis=-1"
        )
    table.check()
    return with_out_sharding(functools.partial(_decoded_rows, jnp.dtype(dtype)), (*mesh_axes(ids), None), (table, ids))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _decoded_rows(dtype: jnp.dtype, table: Table, ids: Integer[Array, "*batch"]) -> Float[Array, "*batch d"]:
    flat = ids.reshape(-1)
    if flat.dtype.itemsize < 4:
        flat = flat.astype(jnp.int32)  # a narrower type may not hold the number of rows
    in_range = (flat >= 0) & (flat < table.shape[0])
    flat = jnp.where(in_range, flat, 0).astype(jnp.int32)  # a wider one may hold numbers that wrap around
    if isinstance(table, PreparedArray):
        numbers = table.rows_at(flat)
        return jnp.where(in_range[:, None], numbers, jnp.nan).astype(dtype).reshape(*ids.shape, table.shape[-1])
    rows = jax.tree.map(lambda leaf: jnp.take(leaf, flat, axis=-2, mode="clip"), table)
    if isinstance(rows, BlockScaledArray):
        scale = jnp.where(in_range[:, None], rows.block_scale, jnp.float16(jnp.nan))
        rows = dataclasses.replace(rows, block_scale=scale)
    else:
        rows = dataclasses.replace(rows, scale=jnp.where(in_range[:, None], rows.scale, jnp.nan))
    return rows.dequantize().astype(dtype).reshape(*ids.shape, table.shape[-1])
