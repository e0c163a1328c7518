"""Weights rounded and packed in one pass over memory, when their scales are known.

XLA makes some ten kernels of it: codes as bytes, and a pass over these for every two planes. `column_packing` has what
the threads do here. The scales, sums and maxima over columns, are left to XLA, which reads the weights once for them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.quantize_rows.emulate import pack_planes
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK
from bipolar_jax.kernels.sm90.weight_prep.pack_threads import COLUMNS, ROWS, ColumnPacking
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing.words import num_words


def pack_columns(
    w: Float[Array, "k n"],
    half_steps: Float[Array, "n groups"],
    offset: Float[Array, "n groups"] | None,
    number_format: BipolarFormat,
    group_size: int | None,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[UInt32[Array, "planes n words"], Int[Array, "n groups"]]:
    """What `weights.pack_weights` gives, for one matrix.

    Args:
      w: float32, bfloat16 or float16.
      half_steps: float32, as `BipolarFormat.encode` has them.
      offset: float32, subtracted from w first.
      number_format: 1 to 8 bits, or ternary.
      group_size: numbers of a column that share a scale; None if all do.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      Unsupported: other dtypes; fewer than 32 rows; groups of other sizes than multiples of 32.
    """
    k, n = w.shape
    if w.dtype.name not in PTX_TYPES:
        raise Unsupported(f"{w.dtype.name} is none of {', '.join(PTX_TYPES)}")
    if k < BLOCK:
        raise Unsupported(f"{k} rows are fewer than the {BLOCK} that a thread packs at a time")
    if group_size is not None and group_size % BLOCK:
        raise Unsupported(f"groups must be multiples of {BLOCK}, not {group_size}: a word has one scale")
    packing = ColumnPacking(PTX_TYPES[w.dtype.name], number_format, k, n, group_size, offset is not None)
    # Of one group for all columns after that of the one before: adjacent lanes load adjacent numbers.
    by_column = [half_steps.T] if offset is None else [half_steps.T, offset.T]

    def kernel(*refs):
        step = _pack_block if interpret is None else _emulate_block
        step(packing, lax.axis_index("block"), *refs)

    planes, sums = launch_kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((number_format.bits, n, packing.words), jnp.uint32),
            jax.ShapeDtypeStruct((packing.parts, n), jnp.int32),
        ],
        grid=(packing.blocks,),
        grid_names=("block",),
        kernel_name="pack_weights",
        interpret=interpret,
        # Threads share nothing.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(w, *by_column)
    if group_size is None:
        return planes, jnp.sum(sums, axis=0)[:, None]
    of_group = group_size // packing.part_size
    filled = jnp.pad(sums, ((0, -packing.parts % of_group), (0, 0)))
    return planes, jnp.sum(filled.reshape(-1, of_group, n), axis=1).T


def _pack_block(packing: ColumnPacking, block: Int[Array, ""], *refs) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(refs)))
    def inline(_, block, *refs):
        packing.pack_block(block.registers.item(), *refs)

    inline(block, *refs)


def _emulate_block(packing: ColumnPacking, block: Int[Array, ""], w, half_steps, *rest) -> None:
    *offset, planes, sums = rest
    column_block, row_block = lax.div(block, packing.row_blocks), lax.rem(block, packing.row_blocks)
    row, part = row_block * ROWS, row_block * (ROWS // packing.part_size)
    fmt = packing.number_format

    def write(rows, columns):
        taken = pl.ds(column_block * COLUMNS, columns)
        groups = jnp.zeros(rows, jnp.int32)
        if packing.group_size is not None:
            groups = (row + jnp.arange(rows)) // packing.group_size
        numbers = w[pl.ds(row, rows), taken].astype(jnp.float32)
        for array in offset:
            numbers = numbers - array[:, taken][groups]
        codes = fmt.encode(numbers, half_steps[:, taken][groups]).T
        planes[:, taken, pl.ds(row // BLOCK, num_words(rows))] = pack_planes(codes, fmt)
        filled = jnp.pad(codes.astype(jnp.int32), ((0, 0), (0, -rows % packing.part_size)))
        totals = jnp.sum(filled.reshape(columns, -1, packing.part_size), axis=-1).T
        sums[pl.ds(part, len(totals)), taken] = totals

    for rows, has_rows in _sizes(row_block, packing.k, ROWS):
        for columns, has_columns in _sizes(column_block, packing.n, COLUMNS):
            pl.when(has_rows & has_columns)(functools.partial(write, rows, columns))


def _sizes(index: Int[Array, ""], total: int, size: int):
    """Sizes that a block along an axis may have, and whether it has."""
    last = (total - 1) // size
    return [(size, index < last), (total - last * size, index == last)]
