"""Shared memory and mbarriers of the product of expanded weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Output
from bipolar_jax.kernels.sm90.gemm.producer import column_ranges
from bipolar_jax.kernels.sm90.gemm.smem import empty_barriers
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.producer import Sources
from bipolar_jax.packing.fields import PARTS


class Scratch(NamedTuple):
    """What the warpgroups of a block share, beside the output's own scratch.

    Attributes:
      tokens: ring buffer, [slots, token_tiles, block_m, 32 words or 64 floats].
      words: ring buffer, uint32 [slots, weight_tiles, PARTS, bits, WORDS_PER_VECTOR].
      group_terms: ring buffer, uint32 [slots, weight_tiles, PARTS, chunks, words], or None.
      token_sums: ring buffer, float32 [slots, chunks, block_m], or None.
      terms: `TokenTerms` and `ColumnTerms` of [tiles_in_progress, problem.token_terms or block_n].
      full: barriers of loaded stages, see `Problem.full_barrier`.
      empty: barriers of stages that may be refilled, one a slot.
      terms_full: barriers of loaded terms, one a tile in progress.
      terms_empty: barriers of terms that may be overwritten, likewise.
      lagged: barrier that the second consumer waits for before its first tile, or None.
    """

    tokens: Any
    words: Any
    group_terms: Any
    token_sums: Any
    terms: Any
    full: Any
    empty: Any
    terms_full: Any
    terms_empty: Any
    lagged: Any


def scratch_types(problem: ExpandedProblem, sources: Sources, output: Output) -> dict[str, Any]:
    """Scratch specifications, keyed by the kernel's keyword arguments: the fields of `Scratch`, and the output's.

    Raises:
      ValueError: it does not fit.
    """
    tiling, itemsize = problem.tiling, output.dtype.itemsize
    problem.check(itemsize)
    if problem.clusters < 1:
        raise ValueError(f"{tiling} needs clusters of {tiling.cluster_size} blocks: allow as many")
    token_terms, column_terms = sources.terms
    copies = 1 + problem.token_tiles + (sources.group_terms is not None) + (sources.token_sums is not None)

    def ring(source):
        return plgpu.SMEM((tiling.slots, problem.weight_tiles, PARTS, *source.shape[3:]), source.dtype)

    own = Scratch(
        tokens=plgpu.SMEM(
            (tiling.slots, problem.token_tiles, tiling.block_m, BYTES_PER_ROW // sources.tokens.dtype.itemsize),
            sources.tokens.dtype,
            transforms=wgmma.TILE_TRANSFORMS,
        ),
        words=ring(sources.words),
        group_terms=None if sources.group_terms is None else ring(sources.group_terms),
        token_sums=None
        if sources.token_sums is None
        else plgpu.SMEM((tiling.slots, problem.chunks, tiling.block_m), jnp.float32),
        terms=tuple(
            jax.tree.map(lambda term, block=block: plgpu.SMEM((tiling.tiles_in_progress, block), term.dtype), terms)
            for terms, block in zip(sources.terms, (problem.token_terms, tiling.block_n), strict=True)
        ),
        # Barriers of loads expect an arrival of every copy.
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=tiling.slots * tiling.tiles_in_progress),
        empty=empty_barriers(tiling),
        terms_full=plgpu.Barrier(
            num_arrivals=len(jax.tree.leaves(token_terms))
            + len(column_ranges(problem, 0)) * len(jax.tree.leaves(column_terms)),
            num_barriers=tiling.tiles_in_progress,
        ),
        terms_empty=plgpu.Barrier(num_arrivals=tiling.consumers_per_tile, num_barriers=tiling.tiles_in_progress),
        lagged=plgpu.Barrier() if problem.stages_of_lag else None,
    )
    return dict(**own._asdict(), **output.scratch(problem, problem.staging_slots(itemsize)))  # no name twice
