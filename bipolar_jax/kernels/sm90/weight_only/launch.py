"""Matrix product of few tokens of floats with packed weights, bound by reading the weights, once.

Weights are the rows of the tensor cores' instruction and tokens its columns. Persistent blocks; each of a block's
warpgroups has its own parts of K, planes of which TMA loads into a ring that runs ahead across tiles. Its warps make
numbers of the planes in registers, where the instruction takes them from, so that they are in shared memory only
packed; values are exact, and scales are applied to float32 sums. The warps' sums of a tile meet in shared memory,
and one warpgroup finishes the tile while the others go on. Tokens are read where they lie, through the L1 cache.
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
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import WORDS_PER_ROW
from bipolar_jax.kernels.sm90.weight_only.config import (
    CHUNK,
    PART,
    WeightOnlyShape,
    WeightOnlyTiling,
    check_dtype,
    check_groups,
    weight_only_tiling,
)
from bipolar_jax.kernels.sm90.weight_only.steps import add_part, finish, no_sums, prefetch_groups, row_terms, scale_rows


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
    """x times scale * value + offset, summed in float32; in x's dtype.

    Args:
      x: bfloat16 or float16, 1 to `most_tokens` rows.
      w_words: bit planes of the weights; a multiple of 4 words.
      scale: of the weights, float32.
      offset: likewise; None if all are 0.
      bias: added last, float32.
      w_format: of the weights.
      group_size: elements of K that share a scale; of no matter if there is one group.
      tiling: how a block shares out its work; None chooses.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: words that TMA cannot address; too many tokens.
      Unsupported: activations of another dtype; groups of another size than 32, 64 or a multiple of 128.
    """
    (m, k), (planes, n, words) = x.shape, w_words.shape
    if words % 4:
        raise ValueError(f"rows must be multiples of 4 words, got {words} words of w")
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
        functools.partial(_kernel, shape, tree, interpret is not None),
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


def _kernel(shape, tree, emulate, *refs, ring, arrived, sums, handed_over, taken):
    *flat, out = refs
    x, w, scale, offset, bias = jax.tree.unflatten(tree, flat)
    tiling = shape.tiling
    me, block, blocks = lax.axis_index("warpgroup"), lax.axis_index("block"), lax.axis_size("block")
    my_tiles = lax.div(shape.tiles - block + blocks - 1, blocks)
    # Parts of K that each warpgroup takes; the last ones may be beyond K.
    turns = -(-shape.k // (PART * tiling.warpgroups))

    def first_row(tile):
        return (block + tile * blocks) * tiling.rows

    def part(turn):
        return me + turn * tiling.warpgroups

    def load(position):
        """Loads what is at a position, counted in parts over tiles."""
        slot = lax.rem(position, tiling.slots)

        @pl.when(position < my_tiles * turns)
        def _():
            # [planes, rows, 32 words]; the whole warpgroup arrives first, so no thread still reads the slot
            plgpu.copy_gmem_to_smem(
                w.at[
                    :,
                    pl.ds(first_row(lax.div(position, turns)), tiling.rows),
                    pl.ds(part(lax.rem(position, turns)) * WORDS_PER_ROW, WORDS_PER_ROW),
                ],
                ring.at[me, slot],
                arrived.at[me * tiling.slots + slot],
            )

    for position in range(tiling.slots):
        load(0 * me + position)

    def tile(index, carry):
        terms = row_terms(shape, scale, offset, first_row(index), emulate=emulate)

        def add(turn, total):
            position = index * turns + turn
            slot = lax.rem(position, tiling.slots)
            # What comes next; after the last tile it is beyond n, where the last row is.
            following = position + 1
            prefetch_groups(
                shape,
                scale,
                offset,
                part(lax.rem(following, turns)),
                first_row(lax.div(following, turns)),
                emulate=emulate,
            )
            plgpu.barrier_wait(arrived.at[me * tiling.slots + slot])
            total = add_part(
                shape, total, ring.at[me, slot], x, scale, offset, part(turn), first_row(index), emulate=emulate
            )
            load(position + tiling.slots)
            return total

        mine = lax.fori_loop(0, turns, add, no_sums(shape))
        mine = scale_rows(shape, mine, terms, emulate=emulate)
        buffer = lax.rem(index, tiling.buffers)

        @pl.when(index >= tiling.buffers)
        def _():
            plgpu.barrier_wait(taken.at[buffer])

        sums[buffer, me] = mine
        plgpu.barrier_arrive(handed_over.at[buffer])

        @pl.when(me == buffer)
        def _():
            plgpu.barrier_wait(handed_over.at[buffer])
            finish(shape, sums.at[buffer], bias, out, first_row(index), emulate=emulate)
            plgpu.barrier_arrive(taken.at[buffer], predicate=index + tiling.buffers < my_tiles)

        return carry

    lax.fori_loop(0, my_tiles, tile, ())
