"""Product of 1 to 64 tokens with prepared weights, bound by reading the weights once: the kernel and its launch.

Weights are the rows of the tensor cores' instruction and tokens its columns. Blocks are persistent. A unit of work is
one part of the weights or a few, 32 columns of the output each, which are contiguous in memory over all of K. One
warpgroup keeps loading slots of several stages: weights, the terms of their groups, and the tokens. The others' warps
divide a slot's parts and stages: each expands its weights in registers, which is the operand of `mma.sync`, and has
sums of its own. The warps' sums of a unit meet in shared memory, eight tokens at a time, and two warpgroups in turn
finish them while the others go on. Where blocks are many and units few, the blocks of a cluster divide K; each then
finishes some of the tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from bipolar_jax.kernels.sm90.arithmetic.epilogue import (
    ColumnTerms,
    TokenTerms,
    activate,
    finish_floats,
    finish_transposed,
)
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.arithmetic.scaled_epilogue import finish_scaled_transposed
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.fragments import WARPS, pinned
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.sync import fence_gpu, synchronize
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR, TILE_TRANSFORMS, WORDS_PER_ROW
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import (
    CHUNK,
    CONSUMER_REGISTERS,
    FINISH_ROWS,
    PRODUCER_REGISTERS,
    FewTokensProblem,
)
from bipolar_jax.kernels.sm90.prepared_few_tokens.producer import Sources, Work, next_slot, produce, work_of
from bipolar_jax.kernels.sm90.prepared_few_tokens.steps import (
    add_blocks,
    add_up,
    gather_tokens,
    hand_over,
    load_columns,
    load_residual,
    multiply_slot,
    store_columns,
    store_finished,
    zero_sums,
)
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import PART_ROWS, WORDS_PER_VECTOR


def launch(
    problem: FewTokensProblem,
    x_words: UInt32[Array, "m words"],
    weights: PreparedArray,
    tokens: TokenTerms,
    columns: ColumnTerms,
    residual: Array | None = None,
    *,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """Runs the kernel.

    Args:
      problem: the static side.
      x_words: signed codes or floats of tokens, zero beyond the true K.
      weights: [k, n].
      tokens, columns: the epilogue's terms, as in `gemm_expanded.launch`.
      residual: added to the output, in its shape and dtype; or None. An output of two halves has none.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      [m, n] in the problem's dtype, or [m, n / 2] with a gated activation.

    Raises:
      ValueError: a tiling that does not fit.
    """
    problem.check()
    x = fill_up(x_words, WORDS_PER_ROW).reshape(problem.m, -1, WORDS_PER_ROW)
    words, group_terms = (
        None if array is None else array.reshape(-1, *array.shape[2:]) for array in (weights.words, weights.terms)
    )
    if residual is not None:
        residual = jnp.pad(residual, ((0, 0), (0, problem.padded_half - problem.half)))
    sources = Sources(x, words, group_terms, tokens, columns, residual)
    arrays, tree = jax.tree.flatten(sources)
    tiling = problem.tiling
    exchanged = (problem.units, tiling.cluster, problem.token_chunks, 2, tiling.rows, CHUNK)
    out, _ = launch_kernel(
        functools.partial(_kernel, problem, tree),
        out_type=[
            jax.ShapeDtypeStruct((problem.m, problem.halves * problem.padded_half), problem.dtype),
            # Totals of the blocks that divide K.
            jax.ShapeDtypeStruct(exchanged if tiling.cluster > 1 else (1,), problem.sums_dtype),
        ],
        grid=(min(problem.units, tiling.clusters(blocks)),),
        grid_names=("cluster",),
        cluster=(tiling.cluster,),
        cluster_names=("rank",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(problem, sources),
        # No automatic barriers: every write of shared memory follows a barrier of our own behind the reads of what it
        # overwrites.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=problem.activation is not None,
        ),
        kernel_name="few_tokens_matmul",
        interpret=interpret,
    )(*arrays)
    if problem.padded_half == problem.half:
        return out
    halves = out.reshape(problem.m, problem.halves, problem.padded_half)
    return halves[..., : problem.half].reshape(problem.m, -1)


def _scratch(problem: FewTokensProblem, sources: Sources) -> dict[str, Any]:
    """Scratch specifications, keyed by the kernel's keyword arguments."""
    tiling, ring = problem.tiling, functools.partial(plgpu.SMEM, dtype=jnp.uint32)
    weights, terms = (tiling.slots, tiling.parts), (problem.term_stages, *problem.terms_shape)
    return dict(
        # Rows beyond m are never loaded. Slots are whole multiples of 1024 bytes, the unit of the swizzle.
        x_ring=ring((tiling.slots, problem.width, problem.token_rows, WORDS_PER_ROW), transforms=TILE_TRANSFORMS),
        words_ring=ring((*weights, tiling.stages, problem.w_bits, WORDS_PER_VECTOR)),
        terms_ring=ring((*weights, *terms)) if problem.chunks else None,
        full=plgpu.Barrier(num_arrivals=2 + (problem.chunks > 0), num_barriers=tiling.slots),
        empty=plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.slots),
        sums=plgpu.SMEM((tiling.buffers, tiling.workers, PART_ROWS, CHUNK), problem.sums_dtype),
        handed_over=plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.buffers),
        taken=plgpu.Barrier(num_barriers=tiling.buffers),
        totals=plgpu.SMEM((tiling.buffers, 2, tiling.rows, CHUNK), problem.sums_dtype),
        tokens=jax.tree.map(lambda term: plgpu.SMEM((tiling.buffers, problem.width), term.dtype), sources.tokens),
        columns=jax.tree.map(lambda term: plgpu.SMEM((tiling.buffers, 2, tiling.rows), term.dtype), sources.columns),
        exchanged=plgpu.ClusterBarrier(collective_axes=("rank",), num_arrivals=tiling.buffers)
        if tiling.cluster > 1
        else None,
    )


def _kernel(problem: FewTokensProblem, tree, *refs, x_ring, words_ring, terms_ring, full, empty, **shared):
    """The kernel of one warpgroup; `_scratch` describes the keyword arguments."""
    *flat, out, by_block = refs
    sources = jax.tree.unflatten(tree, flat)
    tiling, warpgroup = problem.tiling, lax.axis_index("warpgroup")
    work, rings, barriers = work_of(problem), (x_ring, words_ring, terms_ring), (full, empty)

    @when(warpgroup == tiling.warpgroups)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce(problem, sources, work, rings, barriers)

    @when(warpgroup < tiling.warpgroups)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS[tiling.warpgroups], action="increase")
        _consume(problem, sources, work, rings, barriers, (out, by_block), warpgroup, **shared)


def _consume(
    problem: FewTokensProblem,
    sources: Sources,
    work: Work,
    rings,
    barriers,
    targets,
    warpgroup,
    *,
    sums,
    handed_over,
    taken,
    totals,
    tokens,
    columns,
    exchanged,
) -> None:
    """Multiplies this warpgroup's share of all units, and finishes chunks in turn with another warpgroup."""
    tiling, (x_ring, words_ring, terms_ring), (full, empty) = problem.tiling, rings, barriers
    total_steps, total_chunks = work.units * work.turns, work.units * problem.token_chunks
    out, by_block = targets
    finishes = warpgroup < tiling.buffers
    own = [jax.tree.map(lambda ref: ref.at[warpgroup], terms) for terms in (tokens, columns)]

    @when(finishes)
    def _():
        gather_tokens(problem, sources.tokens, own[0])

    def residual(index, chunk):
        return None if sources.residual is None else load_residual(problem, sources.residual, work.unit(index), chunk)

    def unit(index, carry):
        # They arrive under the mainloop; so does the residual of one chunk, but registers do not suffice for more.
        column_terms = load_columns(problem, sources.columns, work.unit(index))
        early = residual(index, jnp.minimum(warpgroup, problem.token_chunks - 1)) if problem.adds_early else None

        def add(turn, carry):
            total, slot = carry
            step = index * work.turns + turn
            plgpu.barrier_wait(full.at[slot])
            terms = None if terms_ring is None else terms_ring.at[slot]
            total = multiply_slot(problem, total, words_ring.at[slot], terms, x_ring.at[slot], warpgroup)
            # Nobody may arrive at a barrier that the producer does not wait for.
            plgpu.barrier_arrive(empty.at[slot], predicate=step + tiling.slots < total_steps)
            return total, next_slot(problem, slot)

        total, slot = lax.fori_loop(0, pinned(work.turns), add, (zero_sums(problem), carry))

        @when(finishes)
        def _():
            synchronize()  # the terms of the unit before have been read
            store_columns(column_terms, own[1])

        for chunk in range(problem.token_chunks):
            position = index * problem.token_chunks + chunk
            buffer = lax.rem(position, tiling.buffers)

            @when(position >= tiling.buffers)
            def _(buffer=buffer):
                plgpu.barrier_wait(taken.at[buffer])

            hand_over(problem, total, chunk, sums.at[buffer], warpgroup)
            plgpu.barrier_arrive(handed_over.at[buffer])

            @when(warpgroup == buffer)
            def _(buffer=buffer, position=position, chunk=chunk):
                added = early if early is not None or tiling.cluster > 1 else residual(index, chunk)
                plgpu.barrier_wait(handed_over.at[buffer])
                synchronize()  # the totals of the chunk before have been read
                share = by_block.at[work.unit(index), lax.axis_index("rank"), chunk] if tiling.cluster > 1 else None
                add_up(problem, sums.at[buffer], totals.at[buffer] if share is None else share)
                plgpu.barrier_arrive(taken.at[buffer], predicate=position + tiling.buffers < total_chunks)
                if share is None:
                    synchronize()
                    _finish(problem, totals.at[buffer], own, out, added, work.unit(index), chunk)

        if tiling.cluster > 1:

            @when(finishes)
            def _():
                _exchange(exchanged)
                for chunk in range(problem.token_chunks):
                    turn, rank = divmod(chunk, tiling.cluster)

                    @when((lax.axis_index("rank") == rank) & (warpgroup == turn % tiling.buffers))
                    def _(chunk=chunk):
                        added = residual(index, chunk)
                        synchronize()  # the totals of the chunk before have been read
                        shares = [by_block.at[work.unit(index), rank, chunk] for rank in range(tiling.cluster)]
                        add_blocks(problem, shares, totals.at[warpgroup])
                        synchronize()
                        _finish(problem, totals.at[warpgroup], own, out, added, work.unit(index), chunk)

        return slot

    lax.fori_loop(0, work.units, unit, jnp.int32(0))


def _exchange(exchanged) -> None:
    """Waits until all blocks of the cluster have stored their totals, and this one sees them."""
    fence_gpu()
    synchronize()
    plgpu.barrier_arrive(exchanged)
    plgpu.barrier_wait(exchanged)
    fence_gpu()


def _finish(problem: FewTokensProblem, totals, terms, out, added, unit, chunk: int) -> None:
    """Finishes a chunk of tokens of all rows of a unit, and stores them.

    Args:
      problem: the static side.
      totals: of `problem.sums_dtype`, [2, rows, CHUNK] in shared memory.
      terms: `TokenTerms` of [width] and `ColumnTerms` of [2, rows] in shared memory.
      out: [m, columns] in memory.
      added: what `load_residual` loaded for the chunk, or None.
      unit: index of the unit.
      chunk: index of the tokens.
    """
    tokens, columns = terms
    tokens = jax.tree.map(lambda ref: ref.at[pl.ds(CHUNK * chunk, CHUNK)], tokens)

    def scaled(block: int, group: int):
        rows = pl.ds(FINISH_ROWS * group, FINISH_ROWS)
        product = plgpu.load(totals.at[block, rows], layout=ACCUMULATOR, optimized=False)
        finish = finish_transposed if problem.float_terms is None else finish_scaled_transposed
        if problem.float_tokens:
            finish = finish_floats
        return finish(
            plgpu.layout_cast(product, plgpu.Layout.WGMMA),
            problem.recovery,
            tokens,
            jax.tree.map(lambda ref: ref.at[block, rows], columns),
        )

    activation = problem.activation
    residuals = {}
    if added is not None:
        residuals = dict(zip(problem.finished, zip(*[iter(added)] * WARPS, strict=True), strict=True))
    for group in range(problem.tiling.rows // FINISH_ROWS):
        finished = [scaled(block, group) for block in range(2)]
        if activation is not None and problem.float_tokens:
            # As of other kernels, an activation takes the product in the dtype that a layer without one hands on.
            finished = [numbers.astype(problem.dtype).astype(jnp.float32) for numbers in finished]
        if activation is not None and activation.gated:
            finished = [activate(activation, finished, jnp.float32)]
        elif activation is not None:
            finished = [activate(activation, [numbers], jnp.float32) for numbers in finished]
        for block, numbers in enumerate(finished):
            store_finished(problem, numbers, out, residuals.get((group, block)), unit, block, group, chunk)
