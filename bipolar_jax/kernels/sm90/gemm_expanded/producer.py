"""The producer warpgroup: fills the ring buffer with tokens, prepared weights and the terms of their groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.gemm.producer import Range, column_ranges
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem


class Sources(NamedTuple):
    """What the producer loads: arrays, in the kernel refs in memory.

    Attributes:
      tokens: [1, rows, words or floats], signed bytes as uint32, or 16-bit floats.
      words: uint32 [tiles, PARTS, stages, bits, WORDS_PER_VECTOR], prepared weights.
      group_terms: uint32 [tiles, PARTS, stages, vectors, vector words], or None.
      token_sums: float32 [sequences, stages * chunks, m], sums of codes over chunks (`scaled_multiply`), or None.
      terms: vectors over tokens, [sequences, m], and over columns, [factors, n].
    """

    tokens: Any
    words: Any
    group_terms: Any
    token_sums: Any
    terms: tuple[TokenTerms, ColumnTerms]


def produce(problem: ExpandedProblem, sources: Sources, scratch) -> None:
    """Fills the ring buffer: a stage for every tile and step over K; then the tile's terms.

    Args:
      problem: sizes and order.
      sources: refs in memory.
      scratch: `smem.Scratch`.
    """
    tiling = problem.tiling
    # Blocks of a cluster load what they share once, and multicast it.
    token_axes = "cluster_n" if tiling.cluster_n > 1 else None
    weight_axes = "cluster_m" if tiling.cluster_m > 1 else None

    def load_weights(origin, k_step, slot, barrier):
        first_tile = lax.div(origin.column, problem.out_tile_n)
        # Behind the last stage tokens are zeros, and any weights do.
        stage = k_step if problem.splits == 1 else jnp.minimum(k_step, sources.words.shape[2] - 1)
        weights = [(sources.words, scratch.words)]
        if scratch.group_terms is not None:
            weights.append((sources.group_terms, scratch.group_terms))
        for source, target in weights:
            plgpu.copy_gmem_to_smem(
                source.at[pl.ds(first_tile, problem.weight_tiles), :, stage],
                target.at[slot],
                barrier,
                collective_axes=weight_axes,
            )

    def load_tile(index, carry):
        origin = problem.block_origin(index)
        sequence = problem.token_segment(origin)
        token_rows = pl.ds(sequence * problem.m + origin.token, tiling.block_m)

        def load_stage(k_step, carry):
            step, slot = carry
            k_step = k_step + problem.first_step(origin)

            @when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(scratch.empty.at[slot])

            barrier = scratch.full.at[problem.full_barrier(index, slot)]
            # Rows, words and tiles beyond the arrays come as zeros.
            for tile in range(problem.token_tiles):
                width = scratch.tokens.shape[-1]
                first = (k_step * problem.token_tiles + tile) * width
                plgpu.copy_gmem_to_smem(
                    sources.tokens.at[0, token_rows, pl.ds(first, width)],
                    scratch.tokens.at[slot, tile],
                    barrier,
                    collective_axes=token_axes,
                )
            load_weights(origin, k_step, slot, barrier)
            if scratch.token_sums is not None:
                plgpu.copy_gmem_to_smem(
                    sources.token_sums.at[
                        sequence, pl.ds(k_step * problem.chunks, problem.chunks), pl.ds(origin.token, tiling.block_m)
                    ],
                    scratch.token_sums.at[slot],
                    barrier,
                    collective_axes=token_axes,
                )
            return step + 1, problem.next_slot(slot)

        carry = lax.fori_loop(0, problem.steps_over_k, load_stage, carry)

        # The terms come last: the epilogue reads them last, and by now their buffer is likely to be free.
        buffer = problem.terms_buffer(index)

        @when(index >= tiling.tiles_in_progress)
        def _():
            plgpu.barrier_wait(scratch.terms_empty.at[buffer])

        ranges = ([Range(sequence, origin.token, 0, problem.token_terms)], column_ranges(problem, origin.column))
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
