"""The producer warpgroup: what it loads from memory, and how that fills the ring buffer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.core.hardware import TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.gemm.problem import Problem


class Sources(NamedTuple):
    """What the producer loads: arrays, in the kernel refs in memory.

    Attributes:
      operands: packed rows of x and of w, uint32 [planes, rows, words].
      group_terms: [groups, n] or [groups, m] each, or None.
      terms: vectors over tokens, [sequences, m], and over columns, [factors, n].
    """

    operands: tuple[Any, Any]
    group_terms: Any
    terms: tuple[TokenTerms, ColumnTerms]


def arrange(
    problem: Problem,
    operands: tuple[jax.Array, jax.Array],
    tokens: TokenTerms,
    columns: ColumnTerms,
    group_terms: GroupTerms | None = None,
) -> Sources:
    """The arrays of a product as the producer loads them.

    TMA copies begin at multiples of 16 bytes. So every sequence's tokens, and every factor's columns, begin a row of
    their own, whose length is a multiple of 16 bytes.
    """
    terms = (_in_rows(tokens, problem.sequences), _in_rows(columns, problem.factors))
    return Sources(operands, aligned(group_terms), terms)


def _in_rows(terms: Any, count: int) -> Any:
    """Vectors as `count` aligned rows."""
    return aligned(jax.tree.map(lambda term: term.reshape(count, -1), terms))


def aligned(arrays: Any) -> Any:
    """Arrays with zeros after their last axis, up to a multiple of 16 bytes."""
    return jax.tree.map(lambda array: fill_up(array, TMA_ALIGNMENT // array.dtype.itemsize), arrays)


class Range(NamedTuple):
    """Rows of an operand that one TMA copy loads, and with them elements of its vectors.

    Attributes:
      segment: a sequence of tokens, or a factor of columns.
      start: the first, counted within the segment.
      offset: where in the block's tile they go.
      size: how many.
    """

    segment: Any
    start: Any
    offset: int
    size: int


def column_ranges(problem: Problem, column) -> list[Range]:
    """What a block loads of w for its tile of the output from `column` on.

    A consumer's gated tile is as many gates, followed by as many values.
    """
    tiling = problem.tiling
    if problem.factors == 1:
        return [Range(0, column, 0, tiling.block_n)]
    return [
        Range(factor, column + first // problem.factors, first + factor * problem.out_tile_n, problem.out_tile_n)
        for first in range(0, tiling.block_n, tiling.tile_n)
        for factor in range(problem.factors)
    ]


def produce(problem: Problem, sources: Sources, scratch) -> None:
    """Fills the ring buffer: a stage for every tile, pair of planes and step over K; then the tile's terms.

    Args:
      problem: sizes and order.
      sources: refs in memory.
      scratch: `smem.Scratch`.
    """
    tiling = problem.tiling
    # Blocks of a cluster load what they share once, and multicast it.
    multicast = ("cluster_n" if tiling.cluster_n > 1 else None, "cluster_m" if tiling.cluster_m > 1 else None)

    def load_tile(index, carry):
        origin = problem.block_origin(index)
        # Beyond a sequence's last token follow those of the next one: rows whose numbers no output stores.
        token_ranges = [Range(problem.token_segment(origin), origin.token, 0, tiling.block_m)]
        ranges = (token_ranges, column_ranges(problem, origin.column))

        def load_step(planes, k_step, carry):
            step, slot = carry
            k_step = k_step + problem.first_step(origin)

            @pl.when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(scratch.empty.at[slot])

            barrier, row = scratch.full.at[problem.full_barrier(index, slot)], scratch.tiles[0].shape[-1]
            for operand, target, plane, operand_ranges, segment_rows, axes in zip(
                sources.operands, scratch.tiles, planes, ranges, (problem.m, problem.n), multicast, strict=True
            ):
                for segment, start, offset, size in operand_ranges:
                    # Rows and words beyond the operand come as zeros.
                    plgpu.copy_gmem_to_smem(
                        operand.at[
                            plane,
                            pl.ds(segment * segment_rows + start, size),
                            pl.ds(k_step * row, row),
                        ],
                        target.at[slot, pl.ds(offset, size)],
                        barrier,
                        collective_axes=axes,
                    )
            if scratch.group_terms is not None:
                _load_group_terms(problem, sources.group_terms, scratch.group_terms, origin, k_step, slot, barrier)
            return step + 1, problem.next_slot(slot)

        for _, pairs in problem.recovery.pair_groups():
            for planes in pairs:
                carry = lax.fori_loop(0, problem.steps_over_k, functools.partial(load_step, planes), carry)

        # The terms come last: the epilogue reads them last, and by now their buffer is likely to be free.
        buffer = problem.terms_buffer(index)

        @pl.when(index >= tiling.tiles_in_progress)
        def _():
            plgpu.barrier_wait(scratch.terms_empty.at[buffer])

        for terms, buffers, term_ranges in zip(sources.terms, scratch.terms, ranges, strict=True):
            for source, target in zip(jax.tree.leaves(terms), jax.tree.leaves(buffers), strict=True):
                for segment, start, offset, size in term_ranges:
                    plgpu.copy_gmem_to_smem(
                        source.at[segment, pl.ds(start, size)],
                        target.at[buffer, pl.ds(offset, size)],
                        scratch.terms_full.at[buffer],
                    )
        return carry

    lax.fori_loop(0, problem.tiles_of_cluster(), load_tile, (jnp.int32(0), jnp.int32(0)))


def _load_group_terms(problem: Problem, sources: GroupTerms, buffers: GroupTerms, origin, k_step, slot, barrier):
    """Loads the terms of the groups in one step over K."""
    group = lax.div(k_step * problem.groups_per_step, problem.steps_per_group)
    for name, target in vars(buffers).items():
        if target is not None:
            start = origin.token if name == "token_sums" else origin.column
            plgpu.copy_gmem_to_smem(
                vars(sources)[name].at[pl.ds(group, problem.groups_per_step), pl.ds(start, target.shape[2])],
                target.at[slot],
                barrier,
            )
