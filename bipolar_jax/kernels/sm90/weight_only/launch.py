"""Weight-only product: float activations of few tokens times packed weights, bound by reading the weights once.

Weights are the rows of the tensor cores' instruction and tokens its columns. Blocks are persistent. Each warpgroup of a
block has its own slices of K: TMA loads their planes into the warpgroup's ring buffer, which runs ahead across tiles.
Its warps unpack the planes to floats in registers, the instruction's operand, so that shared memory holds packed
weights only. Values are exact; scales are applied to float32 sums. The warps' sums of a tile meet in shared memory, and
one warpgroup finishes the tile while the others go on. Tokens are read from global memory, through the L1 cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import ALIGNED_WORDS, MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE, WORDS_PER_ROW
from bipolar_jax.kernels.sm90.weight_only.config import (
    CHUNK,
    WeightOnlyShape,
    WeightOnlyTiling,
    check_dtype,
    check_groups,
    weight_only_tiling,
)
from bipolar_jax.kernels.sm90.weight_only.steps import (
    add_slice,
    finish,
    prefetch_groups,
    row_terms,
    scale_rows,
    zero_sums,
)


def weight_only_product(
    x: Float[Array, "m k"],
    w_words: UInt32[Array, "planes n words"],
    scale: Float[Array, "n groups"],
    offset: Float[Array, "n groups"] | None,
    bias: Float[Array, " n"] | None,
    w_format: BipolarFormat,
    group_size: int | None,
    *,
    tiling: WeightOnlyTiling | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "m n"]:
    """x @ (scale * value + offset)^T + bias, summed in float32; in x's dtype.

    Args:
      x: bfloat16 or float16, 1 to `most_tokens` rows.
      w_words: bit planes of the weights; a multiple of 4 words.
      scale: scales of the weights, float32.
      offset: their offsets, float32; None if all are 0.
      bias: added last, float32.
      w_format: format of the weights.
      group_size: elements of K that share a scale; ignored if there is one group.
      tiling: how a block divides its tiles; None chooses.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: words that TMA cannot address; too many tokens.
      Unsupported: activations of another dtype; groups of another size than 32, 64 or a multiple of 128.
    """
    (m, k), (planes, n, words) = x.shape, w_words.shape
    if words % ALIGNED_WORDS:
        raise ValueError(f"rows must be multiples of {ALIGNED_WORDS} words, got {words} words of w")
    check_dtype(x.dtype)
    groups = scale.shape[1]
    group_size = group_size if groups > 1 else None
    check_groups(group_size)
    if tiling is None:
        tiling = weight_only_tiling(m, k, planes, group_size)
    x = fill_up(x, CHUNK)
    shape = WeightOnlyShape(
        m, n, x.shape[1], w_format, group_size, groups, offset is not None, jnp.dtype(x.dtype), tiling
    )
    flat, tree = jax.tree.flatten((x, w_words, scale, offset, bias))
    out = launch_kernel(
        functools.partial(_kernel, shape, tree),
        out_type=jax.ShapeDtypeStruct((m, shape.tiles * tiling.rows), x.dtype),
        grid=(min(shape.tiles, blocks),),
        grid_names=("block",),
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        scratch_types=_scratch(shape),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="weight_only_matmul",
        interpret=interpret,
    )(*flat)
    return out[:, :n]


def _scratch(shape: WeightOnlyShape) -> dict:
    """Scratch specifications, keyed by the kernel's keyword arguments."""
    tiling = shape.tiling
    return dict(
        ring=plgpu.SMEM(
            (tiling.warpgroups, tiling.slots, shape.w_format.bits, tiling.rows, WORDS_PER_ROW),
            jnp.uint32,
            transforms=wgmma.TILE_TRANSFORMS,
        ),
        arrived=plgpu.Barrier(num_barriers=tiling.warpgroups * tiling.slots),
        sums=plgpu.SMEM((tiling.buffers, tiling.warpgroups, shape.sums_rows, shape.width), jnp.float32),
        handed_over=plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.buffers),
        taken=plgpu.Barrier(num_barriers=tiling.buffers),
    )


def _kernel(shape, tree, *refs, ring, arrived, sums, handed_over, taken):
    """The kernel of one warpgroup; `_scratch` describes the keyword arguments."""
    *flat, out = refs
    x, w, scale, offset, bias = jax.tree.unflatten(tree, flat)
    tiling = shape.tiling
    me, block, blocks = lax.axis_index("warpgroup"), lax.axis_index("block"), lax.axis_size("block")
    my_tiles = lax.div(shape.tiles - block + blocks - 1, blocks)
    # Slices of K that each warpgroup takes; the last ones may be beyond K.
    turns = -(-shape.k // (K_SLICE * tiling.warpgroups))

    def first_row(tile):
        return (block + tile * blocks) * tiling.rows

    def k_slice(turn):
        return me + turn * tiling.warpgroups

    def load(position):
        """Loads the slice at a position; positions count slices across tiles."""
        slot = lax.rem(position, tiling.slots)

        @when(position < my_tiles * turns)
        def _():
            # [planes, rows, 32 words]. Mosaic has the whole warpgroup arrive before the copy: no thread reads the slot
            # any more.
            plgpu.copy_gmem_to_smem(
                w.at[
                    :,
                    pl.ds(first_row(lax.div(position, turns)), tiling.rows),
                    pl.ds(k_slice(lax.rem(position, turns)) * WORDS_PER_ROW, WORDS_PER_ROW),
                ],
                ring.at[me, slot],
                arrived.at[me * tiling.slots + slot],
            )

    for position in range(tiling.slots):
        load(0 * me + position)

    def tile(index, carry):
        terms = row_terms(shape, scale, offset, first_row(index))

        def add(turn, total):
            position = index * turns + turn
            slot = lax.rem(position, tiling.slots)
            # After the last tile the next rows are beyond n: the last row is prefetched instead.
            following = position + 1
            prefetch_groups(
                shape, scale, offset, k_slice(lax.rem(following, turns)), first_row(lax.div(following, turns))
            )
            plgpu.barrier_wait(arrived.at[me * tiling.slots + slot])
            total = add_slice(shape, total, ring.at[me, slot], x, scale, offset, k_slice(turn), first_row(index))
            load(position + tiling.slots)
            return total

        mine = lax.fori_loop(0, turns, add, zero_sums(shape))
        mine = scale_rows(shape, mine, terms)
        buffer = lax.rem(index, tiling.buffers)

        @when(index >= tiling.buffers)
        def _():
            plgpu.barrier_wait(taken.at[buffer])

        sums[buffer, me] = mine
        plgpu.barrier_arrive(handed_over.at[buffer])

        @when(me == buffer)
        def _():
            plgpu.barrier_wait(handed_over.at[buffer])
            finish(shape, sums.at[buffer], bias, out, first_row(index))
            plgpu.barrier_arrive(taken.at[buffer], predicate=index + tiling.buffers < my_tiles)

        return carry

    lax.fori_loop(0, my_tiles, tile, ())
