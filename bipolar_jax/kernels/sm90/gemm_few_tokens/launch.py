"""Matrix product of few tokens with packed weights, bound by reading the weights once.

Weights are the rows of the accumulator. A tile is 64 columns of the output; for every plane of weights the tensor cores
multiply it with all planes of all tokens at once, so that 8-bit activations cost no more than 1-bit ones. Blocks are
persistent. Each warpgroup of a block has its own slices of K, which it loads into its own ring buffers, running ahead
across tiles. The warpgroups' sums meet in shared memory (split-K within the block), and one warpgroup finishes the tile
while the others go on.

With t_i the products of weight plane i, of weight p_i, with the bits of the activations,

    P[n, token] = sum_j q_j sum_i p_i t_i[n, (j, token)]

where the inner sum is Horner's rule in the tensor cores' accumulator, and the outer one adds its column blocks. The
epilogue completes P; see `arithmetic.recovery`.

Tokens whose planes exceed the columns of an instruction are cut into parts. Each part with each tile is a turn of its
own, and neighbouring blocks take the parts of the same tile at the same time: the weights come from memory once, and
from the L2 cache after that.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms, load_column_vector
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import ALIGNED_WORDS, MULTIPROCESSORS, TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE, ROWS_PER_INSTRUCTION, WORDS_PER_ROW
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling, decode_tiling, token_columns, x_planes
from bipolar_jax.kernels.sm90.gemm_few_tokens.groups import (
    WeightGroups,
    decode_groups,
    load_group_terms,
    words_by_group,
)
from bipolar_jax.kernels.sm90.gemm_few_tokens.steps import add_groups, finish_tile, multiply_slice, sum_columns

_LEAST_COPY = 32  # numbers of 4 bytes: Mosaic copies 128 bytes at least


def decode_matmul(
    x_words: UInt32[Array, "x_planes m x_words"],
    w_words: UInt32[Array, "w_planes n w_words"],
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: Recovery,
    dtype: jnp.dtype,
    *,
    groups: WeightGroups | None = None,
    tiling: DecodeTiling | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """x . w^T of packed planes.

    Args:
      x_words: bit planes of the tokens, zero beyond K; a multiple of 4 words.
      w_words: bit planes of the weights, likewise.
      tokens: the epilogue's vectors over rows of x, [m] or more; scale None makes the output the int32 product.
      columns: the epilogue's vectors over rows of w.
      recovery: how planes make products; kind "planes".
      dtype: of the output: float32, bfloat16, float16, or int32.
      groups: scales of groups, in place of `columns.code_sums`, `scale` and `offset`; needs tokens in one part.
      tiling: how a block divides K, and the tokens into parts; None chooses, with one part.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      [m, n] in `dtype`.

    Raises:
      ValueError: words that TMA cannot address.
      Unsupported: more tokens and planes than an instruction has columns, where the tiling is chosen here.
    """
    (_, m, x_width), (_, n, w_width) = x_words.shape, w_words.shape
    if x_width % ALIGNED_WORDS or w_width % ALIGNED_WORDS:
        raise ValueError(
            f"rows must be multiples of {ALIGNED_WORDS} words, got {x_width} words of x and {w_width} of w"
        )
    group_size = None if groups is None else groups.group_size
    if tiling is None:
        tiling = decode_tiling(m, recovery.k, recovery.a_format.bits, recovery.w_format.bits, group_size)
    if groups is not None and tiling.parts > 1:
        raise ValueError(f"groups take tokens in one part, not in {tiling.parts}")
    tiles = -(-n // ROWS_PER_INSTRUCTION)
    terms = None
    if groups is not None:
        terms = decode_groups(x_words, groups, recovery, tiles * ROWS_PER_INSTRUCTION, token_columns(m))
        x_words = words_by_group(x_words, group_size)
    tokens, columns = jax.tree.map(lambda term: fill_up(term, ALIGNED_WORDS), (tokens, columns))
    flat, tree = jax.tree.flatten((tokens, columns, terms))
    columns_unit = TMA_ALIGNMENT // jnp.dtype(dtype).itemsize
    out = launch_kernel(
        functools.partial(_kernel, m, tiles, recovery, tiling, dtype, tree),
        out_type=jax.ShapeDtypeStruct((m, -(-n // columns_unit) * columns_unit), dtype),
        grid=(min(tiles * tiling.parts, blocks),),
        grid_names=("block",),
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        scratch_types=_scratch(m, recovery, tiling, dtype, tokens, columns, group_size),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="decode_matmul",
        interpret=interpret,
    )(x_words, w_words, *flat)
    return out[:, :n]


def _scratch(
    m, recovery: Recovery, tiling: DecodeTiling, dtype, tokens: TokenTerms, columns: ColumnTerms, group_size
) -> dict:
    """Scratch specifications, keyed by the kernel's keyword arguments."""
    part_tokens = tiling.part_tokens(m)
    width, others = token_columns(part_tokens), max(1, tiling.warpgroups - 1)
    all_tokens = -(-tiling.parts * width // _LEAST_COPY) * _LEAST_COPY
    tile = functools.partial(plgpu.SMEM, dtype=jnp.uint32, transforms=wgmma.TILE_TRANSFORMS)
    return dict(
        w_ring=tile((tiling.warpgroups, tiling.w_slots, ROWS_PER_INSTRUCTION, WORDS_PER_ROW)),
        x_ring=tile(
            (
                tiling.warpgroups,
                tiling.x_slots,
                x_planes(part_tokens, recovery.a_format.bits, group_size),
                width,
                WORDS_PER_ROW,
            )
        ),
        w_arrived=plgpu.Barrier(num_barriers=tiling.warpgroups * tiling.w_slots),
        x_arrived=plgpu.Barrier(num_barriers=tiling.warpgroups * tiling.x_slots),
        partial_sums=plgpu.SMEM(
            (others, ROWS_PER_INSTRUCTION, width), jnp.int32 if group_size is None else jnp.float32
        ),
        all_summed=plgpu.Barrier(num_arrivals=others),
        sums_read=plgpu.Barrier(),
        tokens=jax.tree.map(lambda term: plgpu.SMEM((all_tokens,), term.dtype), tokens),
        tokens_arrived=plgpu.Barrier(num_arrivals=len(jax.tree.leaves(tokens))),
        columns=jax.tree.map(lambda term: plgpu.SMEM((ROWS_PER_INSTRUCTION,), term.dtype), columns),
        columns_arrived=plgpu.Barrier(num_arrivals=max(1, len(jax.tree.leaves(columns)))),
        staging=plgpu.SMEM((width, ROWS_PER_INSTRUCTION), dtype),
    )


def _kernel(
    m,
    tiles,
    recovery,
    tiling,
    dtype,
    tree,
    x,
    w,
    *refs,
    w_ring,
    x_ring,
    w_arrived,
    x_arrived,
    tokens,
    tokens_arrived,
    columns,
    columns_arrived,
    **shared,
):
    """The kernel of one warpgroup; `_scratch` describes the keyword arguments."""
    *flat, out = refs
    token_source, column_source, groups = jax.tree.unflatten(tree, flat)
    me, block, blocks = lax.axis_index("warpgroup"), lax.axis_index("block"), lax.axis_size("block")
    width, parts = token_columns(tiling.part_tokens(m)), tiling.parts
    my_tiles = lax.div(tiles * parts - block + blocks - 1, blocks)
    # Slices of K that each warpgroup takes; the last ones may be beyond K, where TMA fills in zeros.
    turns = -(-recovery.k // (K_SLICE * tiling.warpgroups))
    planes = sorted(range(recovery.w_format.bits), key=lambda plane: -recovery.w_format.plane_weights[plane])
    # Not a constant: Pallas would refuse a tile that reaches beyond the tokens from a constant start.
    no_token = 0 * me

    def first_column(index):
        """First column of this block's index-th tile; a tile comes once for every part of the tokens."""
        return lax.div(block + index * blocks, parts) * ROWS_PER_INSTRUCTION

    def first_token(index):
        """First token of this block's index-th tile."""
        return no_token if parts == 1 else lax.rem(block + index * blocks, parts) * width

    def words(position):
        """The words of the slice of K at a position; positions count slices across tiles."""
        return pl.ds((me + lax.rem(position, turns) * tiling.warpgroups) * WORDS_PER_ROW, WORDS_PER_ROW)

    def load_w(position, i):
        """Loads the i-th plane from a position on: beyond the last plane those of the next positions."""
        position, i = position + i // len(planes), i % len(planes)
        slot = lax.rem(position * len(planes) + i, tiling.w_slots)

        @when(position < my_tiles * turns)
        def _():
            # [64, 32 words]
            plgpu.copy_gmem_to_smem(
                w.at[
                    planes[i],
                    pl.ds(first_column(lax.div(position, turns)), ROWS_PER_INSTRUCTION),
                    words(position),
                ],
                w_ring.at[me, slot],
                w_arrived.at[me * tiling.w_slots + slot],
            )

    def load_x(position):
        """Loads all planes of the tokens at a position."""
        slot = lax.rem(position, tiling.x_slots)

        @when(position < my_tiles * turns)
        def _():
            # [x_planes, width, 32 words]
            plgpu.copy_gmem_to_smem(
                x.at[:, pl.ds(first_token(lax.div(position, turns)), width), words(position)],
                x_ring.at[me, slot, pl.ds(0, x.shape[0])],
                x_arrived.at[me * tiling.x_slots + slot],
            )

    start = 0 * me
    for i in range(tiling.w_slots):
        load_w(start, i)
    for position in range(tiling.x_slots):
        load_x(start + position)

    @when(me == 0)
    def _():
        _load_terms(token_source, tokens, no_token, tokens_arrived)

    plgpu.barrier_wait(tokens_arrived)

    def tile(index, carry):
        my_tokens = jax.tree.map(lambda ref: ref.at[pl.ds(first_token(index), width)], tokens)

        @when(me == 0)
        def _():
            _load_terms(column_source, columns, first_column(index), columns_arrived)

        def add_slice(turn, total):
            position = index * turns + turn
            x_slot = lax.rem(position, tiling.x_slots)
            if groups is not None:
                rows = pl.ds(first_column(index), ROWS_PER_INSTRUCTION)
                k_slice = me + turn * tiling.warpgroups
            plgpu.barrier_wait(x_arrived.at[me * tiling.x_slots + x_slot])

            def operands(i):
                slot = lax.rem(position * len(planes) + i, tiling.w_slots)
                plgpu.barrier_wait(w_arrived.at[me * tiling.w_slots + slot])
                return w_ring.at[me, slot], x_ring.at[me, x_slot]

            def refill(i):
                load_w(position, i + tiling.w_slots)

            if groups is None:
                acc = multiply_slice(recovery, planes, width, operands, refill)
                total = total + sum_columns(acc, 0, recovery, width)
            else:
                total = add_groups(
                    total,
                    groups,
                    functools.partial(load_group_terms, groups, recovery, k_slice, rows=rows),
                    load_column_vector(my_tokens.zero_code),
                    recovery,
                    planes,
                    width,
                    operands,
                    refill,
                )
            load_x(position + tiling.x_slots)
            return total

        zeros = wgmma.zeros(ROWS_PER_INSTRUCTION, width)
        if groups is not None:
            zeros = plgpu.layout_cast(jnp.zeros(zeros.shape, jnp.float32), plgpu.Layout.WGMMA)
        total = lax.fori_loop(0, turns, add_slice, zeros)

        @when(me > 0)
        def _():
            @when(index > 0)
            def _():
                plgpu.barrier_wait(shared["sums_read"])

            shared["partial_sums"][me - 1] = total
            plgpu.barrier_arrive(shared["all_summed"])

        @when(me == 0)
        def _():
            terms = (my_tokens, columns)
            target = out.at[pl.ds(first_token(index), width), pl.ds(first_column(index), ROWS_PER_INSTRUCTION)]
            finish_tile(total, recovery, tiling, dtype, terms, columns_arrived, target, index + 1 == my_tiles, **shared)

        return carry

    lax.fori_loop(0, my_tiles, tile, ())

    @when(me == 0)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load_terms(sources, targets, start, barrier):
    for source, target in zip(jax.tree.leaves(sources), jax.tree.leaves(targets), strict=True):
        plgpu.copy_gmem_to_smem(source.at[pl.ds(start, target.shape[0])], target, barrier)
