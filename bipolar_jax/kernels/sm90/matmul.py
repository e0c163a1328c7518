"""Matrix product of packed operands on Hopper's tensor cores.

One persistent block a multiprocessor. A producer warpgroup loads blocks of both operands by
TMA into a ring of slots and runs ahead across output tiles; two consumer warpgroups multiply
and finish tiles independently, so that while one is in its epilogue the other, and the loads,
go on. Products never leave registers before they are finished numbers.
"""

from __future__ import annotations

import functools
import itertools

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
      x_words: bit planes (kind "planes": bit b of word w is element 32 w + b) or signed bytes (kind
        "int8", one plane, elements in the same order as w's), zero where k is not below the
        true K; the number of words a multiple of 4.
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
        # No thread reads what it or an async copy then overwrites without a barrier in between.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
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
        self.tiles_at_a_time, self.consumers_of_tile = (CONSUMERS, 1) if self.alternate else (1, CONSUMERS)
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

    def full_barrier(self, index, slot):
        """Barriers count the phases that each waiter saw, so consumers of alternate tiles have their own."""
        return self.buffer(index) * self.tiling.slots + slot

    def buffer(self, index):
        """Which of the tiles in progress the index-th is."""
        return lax.rem(index, self.tiles_at_a_time)


def _scratch(work: _Work, terms: list, terms_tree) -> dict:
    tiling = work.tiling
    tokens, columns = jax.tree.unflatten(terms_tree, [term.dtype for term in terms])
    empty = functools.partial(plgpu.Barrier, num_arrivals=work.consumers_of_tile)
    if work.cluster_axes:
        empty = functools.partial(
            plgpu.ClusterBarrier, collective_axes=work.cluster_axes, num_arrivals=work.consumers_of_tile
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
        # One buffer for every tile in progress.
        token_terms=jax.tree.map(lambda dtype: plgpu.SMEM((work.tiles_at_a_time, tiling.block_m), dtype), tokens),
        column_terms=jax.tree.map(lambda dtype: plgpu.SMEM((work.tiles_at_a_time, tiling.block_n), dtype), columns),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.slots * work.tiles_at_a_time),
        empty=empty(num_barriers=tiling.slots),
        terms_full=plgpu.Barrier(num_arrivals=len(terms), num_barriers=work.tiles_at_a_time),
        terms_empty=plgpu.Barrier(num_arrivals=work.consumers_of_tile, num_barriers=work.tiles_at_a_time),
    )


def _kernel(work: _Work, terms_tree, x, w, *terms_and_out, staging, **shared):
    *terms, out = terms_and_out
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(work, x, w, jax.tree.unflatten(terms_tree, terms), **shared)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        _consume(work, out, staging, **shared)


def _produce(
    work: _Work, x, w, terms, *, x_tiles, w_tiles, token_terms, column_terms, full, empty, terms_full, terms_empty
):
    """Loads, for every tile, plane pair and block of K, a block of x and one of w into the next slot."""
    tiling = work.tiling

    def tile(index, carry):
        m_start, n_start = work.origin(index)

        def load(x_plane, w_plane, k_block, carry):
            step, slot = carry

            @pl.when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            words = pl.ds(k_block * WORDS_PER_ROW, WORDS_PER_ROW)
            barrier = full.at[work.full_barrier(index, slot)]
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

        # Last, as the epilogue wants them last, and as their buffer is surely free by now.
        buffer = work.buffer(index)

        @pl.when(index >= work.tiles_at_a_time)
        def _():
            plgpu.barrier_wait(terms_empty.at[buffer])

        for sources, buffers, start in ((terms[0], token_terms, m_start), (terms[1], column_terms, n_start)):
            for source, target in zip(jax.tree.leaves(sources), jax.tree.leaves(buffers), strict=True):
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(start, target.shape[1])], target.at[buffer], terms_full.at[buffer]
                )
        return carry

    lax.fori_loop(0, work.my_tiles(), tile, (jnp.int32(0), jnp.int32(0)))


def _consume(
    work: _Work, out, staging, *, x_tiles, w_tiles, token_terms, column_terms, full, empty, terms_full, terms_empty
):
    """Multiplies and finishes this consumer's tiles."""
    tiling, emulate = work.tiling, work.emulate
    me = lax.axis_index("warpgroup")
    # This consumer's part of a block's tile.
    rows = pl.ds(me * tiling.tile_m if tiling.schedule == "split_m" else 0, tiling.tile_m)
    columns = pl.ds(me * tiling.tile_n if tiling.schedule == "split_n" else 0, tiling.tile_n)
    first = me if work.alternate else 0
    total_steps = work.my_tiles() * work.steps_per_tile

    def release(step, slot):
        """Lets the producer refill the slot, if it will: nobody must arrive on a block that is gone."""

        @pl.when(step + tiling.slots < total_steps)
        def _():
            plgpu.barrier_arrive(empty.at[slot])

    def tile(turn, carry):
        index = first + turn * work.tiles_at_a_time
        # acc: [tile_m, tile_n]
        acc = tensor_core.zeros(tiling.tile_m, tiling.tile_n)
        step = index * work.steps_per_tile
        slot = lax.rem(step, tiling.slots)
        for shift, pairs in work.groups:
            acc = tensor_core.begin(acc << shift if shift else acc, emulate=emulate)

            def multiply(position, carry):
                acc, step, slot, previous = carry
                plgpu.barrier_wait(full.at[work.full_barrier(index, slot)])
                acc = tensor_core.accumulate(
                    acc, x_tiles.at[slot, rows], w_tiles.at[slot, columns], work.recovery.kind, emulate=emulate
                )
                plgpu.wgmma_wait(1)

                @pl.when(position > 0)
                def _():
                    release(step - 1, previous)

                return acc, step + 1, work.next_slot(slot), slot

            with jax.named_scope("mainloop"):
                acc, step, slot, last = lax.fori_loop(0, len(pairs) * work.k_blocks, multiply, (acc, step, slot, slot))
            with jax.named_scope("settle"):
                acc = tensor_core.settle(acc, emulate=emulate)
                release(step - 1, last)

        with jax.named_scope("epilogue"):
            m_start, n_start = work.origin(index)
            buffer = work.buffer(index)
            plgpu.barrier_wait(terms_full.at[buffer])
            _store(
                work,
                acc,
                jax.tree.map(lambda ref: ref.at[buffer, rows], token_terms),
                jax.tree.map(lambda ref: ref.at[buffer, columns], column_terms),
                staging.at[me],
                out.at[pl.ds(m_start + rows.start, rows.size), pl.ds(n_start + columns.start, columns.size)],
            )

            @pl.when(index + work.tiles_at_a_time < work.my_tiles())
            def _():
                plgpu.barrier_arrive(terms_empty.at[buffer])

        return carry

    my_turns = (work.my_tiles() - first + work.tiles_at_a_time - 1) // work.tiles_at_a_time
    lax.fori_loop(0, my_turns, tile, ())
    plgpu.wait_smem_to_gmem(0)


def _store(work: _Work, acc, token_terms, column_terms, staging, out):
    """Finishes the accumulator piece by piece, 64 rows of 128 bytes each.

    Args:
      acc: [tile_m, tile_n].
      token_terms: refs [tile_m] in shared memory.
      column_terms: refs [tile_n] in shared memory.
      staging: [slots, 64, width] in shared memory.
      out: [tile_m, tile_n] in memory.
    """
    tile_m, tile_n = acc.shape
    slots, height, width = staging.shape
    pieces = [pl.ds(row, height) for row in range(0, tile_m, height)]
    # Pieces of a column share barriers where that leaves room for as many on their way.
    batch = len(pieces) if slots >= 2 * len(pieces) else 1
    slot = 0
    for column in range(0, tile_n, width):
        chunk = pl.ds(column, width)
        # finished: [tile_m, width]; all rows at once, so that column terms are read once.
        finished = finish(
            plgpu.layout_cast(lax.slice(acc, (0, column), (tile_m, column + width)), plgpu.Layout.WGMMA),
            work.recovery,
            token_terms,
            jax.tree.map(lambda ref, chunk=chunk: ref.at[chunk], column_terms),
            work.dtype,
        )
        for some in itertools.batched(pieces, batch):
            # What was in these slots must have been read.
            plgpu.wait_smem_to_gmem(slots - batch, wait_read_only=True)
            for i, piece in enumerate(some):
                staging[(slot + i) % slots] = lax.slice(finished, (piece.start, 0), (piece.start + height, width))
            plgpu.commit_smem()
            for i, piece in enumerate(some):
                plgpu.copy_smem_to_gmem(staging.at[(slot + i) % slots], out.at[piece, chunk])
            slot += batch
