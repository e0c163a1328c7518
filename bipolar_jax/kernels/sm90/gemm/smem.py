"""Shared memory and mbarriers of the product."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import GroupTerms
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, TILE_TRANSFORMS
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Output
from bipolar_jax.kernels.sm90.gemm.problem import Problem
from bipolar_jax.kernels.sm90.gemm.producer import Sources, column_ranges


class Scratch(NamedTuple):
    """What the warpgroups of a block share, beside the output's own scratch.

    Attributes:
      tiles: ring buffers of both operands, [slots, block_m or block_n, words of BYTES_PER_ROW].
      group_terms: `GroupTerms` of [slots, groups_per_step, block_n or block_m] in the same stages, or None.
      terms: `TokenTerms` and `ColumnTerms` of [tiles_in_progress, block_m or block_n].
      full: barriers of loaded stages, see `Problem.full_barrier`.
      empty: barriers of stages that may be refilled, one a slot.
      terms_full: barriers of loaded terms, one a tile in progress.
      terms_empty: barriers of terms that may be overwritten, likewise.
    """

    tiles: Any
    group_terms: Any
    terms: Any
    full: Any
    empty: Any
    terms_full: Any
    terms_empty: Any


def scratch_types(problem: Problem, sources: Sources, output: Output) -> dict[str, Any]:
    """Scratch specifications, keyed by the kernel's keyword arguments: the fields of `Scratch`, and the output's.

    Raises:
      ValueError: it does not fit.
    """
    tiling = problem.tiling
    group_terms = _group_term_buffers(problem, sources.group_terms)
    group_bytes = sum(4 * math.prod(buffer.shape[1:]) for buffer in jax.tree.leaves(group_terms))
    tiling.check(group_bytes)
    if problem.clusters < 1:
        raise ValueError(f"{tiling} needs clusters of {tiling.cluster_size} blocks: allow as many")
    blocks = tiling.block_m, tiling.block_n
    # A barrier of loads expects an arrival of every copy.
    column_copies = len(column_ranges(problem, 0))
    token_terms, column_terms = sources.terms
    own = Scratch(
        tiles=tuple(
            plgpu.SMEM(
                (tiling.slots, block, BYTES_PER_ROW // rows.dtype.itemsize), rows.dtype, transforms=TILE_TRANSFORMS
            )
            for rows, block in zip(sources.operands, blocks, strict=True)
        ),
        group_terms=group_terms,
        terms=tuple(
            jax.tree.map(lambda term, block=block: plgpu.SMEM((tiling.tiles_in_progress, block), term.dtype), terms)
            for terms, block in zip(sources.terms, blocks, strict=True)
        ),
        full=plgpu.Barrier(
            num_arrivals=1 + column_copies + len(jax.tree.leaves(sources.group_terms)),
            num_barriers=tiling.slots * tiling.tiles_in_progress,
        ),
        empty=empty_barriers(tiling),
        terms_full=plgpu.Barrier(
            num_arrivals=len(jax.tree.leaves(token_terms)) + column_copies * len(jax.tree.leaves(column_terms)),
            num_barriers=tiling.tiles_in_progress,
        ),
        terms_empty=plgpu.Barrier(num_arrivals=tiling.consumers_per_tile, num_barriers=tiling.tiles_in_progress),
    )
    return dict(**own._asdict(), **output.scratch(problem, tiling.staging_slots(group_bytes)))  # no name twice


def empty_barriers(tiling: Tiling) -> plgpu.Barrier | plgpu.ClusterBarrier:
    """Barriers of stages that may be refilled, one a slot: all consumers of a cluster arrive."""
    arrivals = dict(num_arrivals=tiling.consumers_per_tile, num_barriers=tiling.slots)
    axes = [name for name in ("cluster_m", "cluster_n") if getattr(tiling, name) > 1]
    return plgpu.ClusterBarrier(collective_axes=tuple(axes), **arrivals) if axes else plgpu.Barrier(**arrivals)


def _group_term_buffers(problem: Problem, terms: GroupTerms | None) -> GroupTerms | None:
    """Buffers for the terms of groups that are given, a stage each."""
    if terms is None:
        return None
    block_m, block_n = problem.tiling.block_m, problem.tiling.block_n
    sizes = {"scale": block_n, "offset": block_n, "token_sums": block_m}
    return GroupTerms(
        **{
            name: plgpu.SMEM((problem.tiling.slots, problem.groups_per_step, sizes[name]), jnp.float32)
            for name, term in vars(terms).items()
            if term is not None
        }
    )
