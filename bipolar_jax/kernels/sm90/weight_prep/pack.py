"""Weights rounded and packed in one pass over memory, given their scales.

XLA makes about ten kernels of this: codes as bytes, and a pass over the codes for every two planes. XLA still computes
the scales, from sums and maxima over columns, in one more pass over the weights. `pack_threads` is what the threads do.
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
from bipolar_jax.kernels.sm90.arithmetic.operands import pack_planes
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel, with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, scalar_of
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
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
    """`kernels.semantics.weights.pack_weights` for one matrix.

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
    # [groups, n]: adjacent lanes load adjacent columns of one group.
    column_terms = [half_steps.T] if offset is None else [half_steps.T, offset.T]

    def kernel(*refs):
        _pack_block(packing, lax.axis_index("block"), *refs)

    planes, sums = launch_kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((number_format.bits, n, packing.words), jnp.uint32),
            jax.ShapeDtypeStruct((packing.num_sums, n), jnp.int32),
        ],
        grid=(packing.blocks,),
        grid_names=("block",),
        kernel_name="pack_weights",
        interpret=interpret,
        # No barriers: threads share no memory.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(w, *column_terms)
    if group_size is None:
        return planes, jnp.sum(sums, axis=0, dtype=jnp.int32)[:, None]
    sums_per_group = group_size // packing.sum_length
    filled = jnp.pad(sums, ((0, -packing.num_sums % sums_per_group), (0, 0)))
    return planes, jnp.sum(filled.reshape(-1, sums_per_group, n), axis=1, dtype=jnp.int32).T


def _pack_block_twin(packing: ColumnPacking, block: Int[Array, ""], w, half_steps, *rest) -> None:
    *offset, planes, sums = rest
    column_block, row_block = lax.div(block, packing.row_blocks), lax.rem(block, packing.row_blocks)
    row, first_sum = row_block * ROWS, row_block * (ROWS // packing.sum_length)
    fmt = packing.number_format

    def write(rows, columns):
        column_slice = pl.ds(column_block * COLUMNS, columns)
        groups = jnp.zeros(rows, jnp.int32)
        if packing.group_size is not None:
            groups = (row + jnp.arange(rows)) // packing.group_size
        numbers = w[pl.ds(row, rows), column_slice].astype(jnp.float32)
        for array in offset:
            numbers = numbers - array[:, column_slice][groups]
        codes = fmt.encode(numbers, half_steps[:, column_slice][groups]).T
        planes[:, column_slice, pl.ds(row // BLOCK, num_words(rows))] = pack_planes(codes, fmt)
        filled = jnp.pad(codes.astype(jnp.int32), ((0, 0), (0, -rows % packing.sum_length)))
        totals = jnp.sum(filled.reshape(columns, -1, packing.sum_length), axis=-1).T
        sums[pl.ds(first_sum, len(totals)), column_slice] = totals

    for rows, has_rows in _sizes(row_block, packing.k, ROWS):
        for columns, has_columns in _sizes(column_block, packing.n, COLUMNS):
            when(has_rows & has_columns)(functools.partial(write, rows, columns))


@with_twin(_pack_block_twin)
def _pack_block(packing: ColumnPacking, block: Int[Array, ""], *refs) -> None:
    """`ColumnPacking.pack_block` on refs."""

    @plgpu.inline_mgpu(arg_types=(SPLAT, *[plgpu.RefType()] * len(refs)))
    def inline(_, block, *refs):
        packing.pack_block(scalar_of(block), *refs)

    inline(block, *refs)


def _sizes(index: Int[Array, ""], total: int, size: int):
    """The sizes that a block along an axis can have, each with the condition that it has it."""
    last = (total - 1) // size
    return [(size, index < last), (total - last * size, index == last)]
