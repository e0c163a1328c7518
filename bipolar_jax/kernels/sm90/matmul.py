"""Matrix product of packed operands on Hopper's tensor cores.

One persistent block a multiprocessor. A producer warpgroup loads blocks of both operands by
TMA into a ring of slots and runs ahead across output tiles; two consumer warpgroups multiply
and finish tiles independently, so that while one is in its epilogue the other, and the loads,
go on. Products never leave registers before they are finished numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from bipolar_jax.kernels.sm90 import tensor_core
from bipolar_jax.kernels.sm90.epilogue import STAGING_TRANSFORMS, ColumnTerms, TokenTerms, chunk_columns, finish
from bipolar_jax.kernels.sm90.recovery import Recovery
from bipolar_jax.kernels.sm90.tensor_core import ELEMENTS_PER_ROW, ROWS_PER_INSTRUCTION, WORDS_PER_ROW
from bipolar_jax.kernels.sm90.tiling import CONSUMERS, Tiling

MULTIPROCESSORS = 132
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232
_TMA_ALIGNMENT = 16  # bytes, of the stride of rows in memory


def packed_matmul(
    x_words: UInt32[Array, "x_planes m x_words"],
    w_words: UInt32[Array, "w_planes n w_words"],
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: Recovery,
    tiling: Tiling,
    dtype: jnp.dtype,
    *,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """x . w^T of packed numbers, finished by the epilogue.

    Args:
      x_words: bit planes (kind "b1": bit b of word w is element 32 w + b) or int8 codes (kind
        "s8", one plane, the same order of elements as w's), zero where k is not below the true
        K; the number of words a multiple of 4.
      w_words: likewise.
      tokens: terms of rows; scale None makes the output the int32 product.
      columns: terms of columns.
      recovery: how planes make products.
      tiling: shape of the work.
      dtype: of the output: float32, bfloat16, float16, or int32.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      [m, n] in `dtype`.

    Raises:
      ValueError: a tiling that does not fit, or words that TMA cannot address.
    """
    tiling.check()
    (_, m, x_width), (_, n, w_width) = x_words.shape, w_words.shape
    if x_width % 4 or w_width % 4:
        raise ValueError(f"rows must be multiples of 4 words, got {x_width} words of x and {w_width} of w")
    # What TMA stores has rows of whole 16 bytes.
    padded_n = -(-n // (columns_unit := _TMA_ALIGNMENT // jnp.dtype(dtype).itemsize)) * columns_unit
    work = _Work(m, n, recovery, tiling, dtype, blocks // tiling.cluster_size, interpret is not None)
    terms, terms_tree = jax.tree.flatten((tokens, columns))
    out = plgpu.kernel(
        functools.partial(_kernel, work, terms_tree),
        out_type=jax.ShapeDtypeStruct((m, padded_n), dtype),
        grid=(work.clusters,),
        grid_names=("cluster",),
        cluster=(tiling.cluster_m, tiling.cluster_n),
        cluster_names=("cluster_m", "cluster_n"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(work, terms, terms_tree),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x_words, w_words, *terms)
    return out[:, :n]


class _Work:
    """The static side of one product: sizes, order of tiles, who does which."""

    def __init__(self, m, n, recovery, tiling, dtype, clusters, emulate):
        self.recovery, self.tiling, self.dtype, self.emulate = recovery, tiling, dtype, emulate
        self.groups = recovery.pair_groups()
        self.k_blocks = -(-recovery.k // ELEMENTS_PER_ROW[recovery.kind])
        self.steps_per_tile = self.k_blocks * recovery.num_pairs
        # In units of what a cluster does together.
        self.m_tiles = -(-m // (tiling.block_m * tiling.cluster_m))
        self.n_tiles = -(-n // (tiling.block_n * tiling.cluster_n))
        self.tiles = self.m_tiles * self.n_tiles
        self.clusters = min(clusters, self.tiles)
        self.alternate = tiling.schedule == "alternate"
        self.cluster_axes = tuple(
            name for name, size in (("cluster_m", tiling.cluster_m), ("cluster_n", tiling.cluster_n)) if size > 1
        )

    def my_tiles(self):
        """How many tiles this cluster has: number cluster, cluster + clusters, ..."""
        return (self.tiles - lax.axis_index("cluster") + self.clusters - 1) // self.clusters

    def origin(self, index):
        """First row and column of this block's part of the cluster's index-th tile."""
        tiling = self.tiling
        m_tile, n_tile = plgpu.planar_snake(
            lax.axis_index("cluster") + index * self.clusters,
            (self.m_tiles, self.n_tiles),
            minor_dim=0 if tiling.band_axis == "m" else 1,
            tile_width=tiling.band,
        )
        return (
            (m_tile * tiling.cluster_m + lax.axis_index("cluster_m")) * tiling.block_m,
            (n_tile * tiling.cluster_n + lax.axis_index("cluster_n")) * tiling.block_n,
        )

    def next_slot(self, slot):
        return lax.select(slot + 1 == self.tiling.slots, 0, slot + 1)

    def full_barrier(self, consumer, slot):
        """Barriers count the phases that each waiter saw, so alternating consumers have their own."""
        return consumer * self.tiling.slots + slot if self.alternate else slot


def _scratch(work: _Work, terms: list, terms_tree) -> dict:
    tiling = work.tiling
    tokens, columns = jax.tree.unflatten(terms_tree, [term.dtype for term in terms])
    empty = functools.partial(plgpu.Barrier, num_arrivals=1 if work.alternate else CONSUMERS)
    if work.cluster_axes:
        empty = functools.partial(
            plgpu.ClusterBarrier,
            collective_axes=work.cluster_axes,
            num_arrivals=1 if work.alternate else CONSUMERS,
        )
    return dict(
        x_tiles=plgpu.SMEM(
            (tiling.slots, tiling.block_m, WORDS_PER_ROW), jnp.uint32, transforms=tensor_core.TILE_TRANSFORMS
        ),
        w_tiles=plgpu.SMEM(
            (tiling.slots, tiling.block_n, WORDS_PER_ROW), jnp.uint32, transforms=tensor_core.TILE_TRANSFORMS
        ),
        staging=plgpu.SMEM(
            (CONSUMERS, tiling.staging_slots, ROWS_PER_INSTRUCTION, chunk_columns(work.dtype)),
            work.dtype,
            transforms=STAGING_TRANSFORMS,
        ),
        token_terms=jax.tree.map(lambda dtype: plgpu.SMEM((CONSUMERS, tiling.tile_m), dtype), tokens),
        column_terms=jax.tree.map(lambda dtype: plgpu.SMEM((CONSUMERS, tiling.tile_n), dtype), columns),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.slots * (CONSUMERS if work.alternate else 1)),
        empty=empty(num_barriers=tiling.slots),
        terms_full=plgpu.Barrier(num_arrivals=len(terms), num_barriers=CONSUMERS),
    )


def _kernel(work: _Work, terms_tree, x, w, *terms_and_out, x_tiles, w_tiles, full, empty, **consumer_scratch):
    *terms, out = terms_and_out
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(work, x, w, x_tiles, w_tiles, full, empty)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        terms_in_memory = jax.tree.unflatten(terms_tree, terms)
        _consume(work, terms_in_memory, out, x_tiles, w_tiles, full, empty, **consumer_scratch)


def _produce(work: _Work, x, w, x_tiles, w_tiles, full, empty):
    """Loads, for every tile, plane pair and block of K, a block of x and one of w into the next slot."""
    tiling = work.tiling

    def tile(index, carry):
        m_start, n_start = work.origin(index)
        consumer = lax.rem(index, CONSUMERS) if work.alternate else 0

        def load(x_plane, w_plane, k_block, carry):
            step, slot = carry

            @pl.when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            words = pl.ds(k_block * WORDS_PER_ROW, WORDS_PER_ROW)
            barrier = full.at[work.full_barrier(consumer, slot)]
            # x_tiles.at[slot]: [block_m, 32 words]; rows and words beyond the operand come as zeros.
            plgpu.copy_gmem_to_smem(
                x.at[x_plane, pl.ds(m_start, tiling.block_m), words],
                x_tiles.at[slot],
                barrier,
                collective_axes="cluster_n" if tiling.cluster_n > 1 else None,
            )
            # w_tiles.at[slot]: [block_n, 32 words]
            plgpu.copy_gmem_to_smem(
                w.at[w_plane, pl.ds(n_start, tiling.block_n), words],
                w_tiles.at[slot],
                barrier,
                collective_axes="cluster_m" if tiling.cluster_m > 1 else None,
            )
            return step + 1, work.next_slot(slot)

        for _, pairs in work.groups:
            for x_plane, w_plane in pairs:
                carry = lax.fori_loop(0, work.k_blocks, functools.partial(load, x_plane, w_plane), carry)
        return carry

    lax.fori_loop(0, work.my_tiles(), tile, (jnp.int32(0), jnp.int32(0)))


def _consume(work: _Work, terms, out, x_tiles, w_tiles, full, empty, *, staging, token_terms, column_terms, terms_full):
    """Multiplies and finishes this consumer's tiles."""
    tiling, emulate = work.tiling, work.emulate
    me = lax.axis_index("warpgroup")
    # This consumer's part of a block's tile, in rows and columns.
    row_part = me * tiling.tile_m if tiling.schedule == "split_m" else 0
    column_part = me * tiling.tile_n if tiling.schedule == "split_n" else 0
    stride = CONSUMERS if work.alternate else 1
    first = me if work.alternate else 0
    total_steps = work.my_tiles() * work.steps_per_tile

    def release(step, slot):
        """Lets the producer refill the slot, if it will: nobody must arrive on a block that is gone."""

        @pl.when(step + tiling.slots < total_steps)
        def _():
            plgpu.barrier_arrive(empty.at[slot])

    def tile(turn, carry):
        index = first + turn * stride
        m_start, n_start = work.origin(index)
        m_start, n_start = m_start + row_part, n_start + column_part
        _load_terms(terms, (token_terms, column_terms), m_start, n_start, tiling, me, terms_full)

        # acc: [tile_m, tile_n]
        acc = tensor_core.zeros(tiling.tile_m, tiling.tile_n)
        step = index * work.steps_per_tile
        slot = lax.rem(step, tiling.slots)
        for shift, pairs in work.groups:
            acc = tensor_core.begin(acc << shift if shift else acc, emulate=emulate)

            def multiply(position, carry):
                acc, step, slot, previous = carry
                plgpu.barrier_wait(full.at[work.full_barrier(me, slot)])
                acc = tensor_core.accumulate(
                    acc,
                    x_tiles.at[slot, pl.ds(row_part, tiling.tile_m)],
                    w_tiles.at[slot, pl.ds(column_part, tiling.tile_n)],
                    work.recovery.kind,
                    emulate=emulate,
                )
                plgpu.wgmma_wait(1)

                @pl.when(position > 0)
                def _():
                    release(step - 1, previous)

                return acc, step + 1, work.next_slot(slot), slot

            acc, step, slot, last = lax.fori_loop(0, len(pairs) * work.k_blocks, multiply, (acc, step, slot, slot))
            acc = tensor_core.settle(acc, emulate=emulate)
            release(step - 1, last)
        plgpu.barrier_wait(terms_full.at[me])
        _store(work, acc, out, m_start, n_start, me, staging, token_terms, column_terms)
        return carry

    my_turns = (work.my_tiles() - first + stride - 1) // stride
    lax.fori_loop(0, my_turns, tile, ())
    plgpu.wait_smem_to_gmem(0)


def _load_terms(terms, buffers, m_start, n_start, tiling: Tiling, me, barrier):
    """Brings the terms of this consumer's rows and columns on chip while it multiplies."""
    for source, target, start, size in zip(
        terms, buffers, (m_start, n_start), (tiling.tile_m, tiling.tile_n), strict=True
    ):
        for name, ref in vars(source).items():
            if ref is not None:
                plgpu.copy_gmem_to_smem(ref.at[pl.ds(start, size)], vars(target)[name].at[me], barrier.at[me])


def _store(work: _Work, acc, out, m_start, n_start, me, staging, token_terms, column_terms):
    """Finishes the accumulator piece by piece: 64 rows of 128 bytes."""
    tiling = work.tiling
    width = chunk_columns(work.dtype)
    pieces = [(i, j) for i in range(tiling.tile_m // ROWS_PER_INSTRUCTION) for j in range(tiling.tile_n // width)]
    for number, (i, j) in enumerate(pieces):
        row, column = i * ROWS_PER_INSTRUCTION, j * width
        # product: [64, width]
        product = lax.slice(acc, (row, column), (row + ROWS_PER_INSTRUCTION, column + width))
        finished = finish(
            plgpu.layout_cast(product, plgpu.Layout.WGMMA),
            work.recovery,
            jax.tree.map(lambda ref, row=row: ref.at[me, pl.ds(row, ROWS_PER_INSTRUCTION)], token_terms),
            jax.tree.map(lambda ref, column=column: ref.at[me, pl.ds(column, width)], column_terms),
            work.dtype,
        )
        slot = number % tiling.staging_slots
        # The piece that used this slot before must have been read.
        plgpu.wait_smem_to_gmem(tiling.staging_slots - 1, wait_read_only=True)
        staging[me, slot] = finished
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            staging.at[me, slot],
            out.at[pl.ds(m_start + row, ROWS_PER_INSTRUCTION), pl.ds(n_start + column, width)],
        )
