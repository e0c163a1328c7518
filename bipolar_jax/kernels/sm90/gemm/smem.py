"""Shared memory and barriers of the product."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import GroupTerms, chunk_columns, staging_transforms
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION, WORDS_PER_ROW
from bipolar_jax.kernels.sm90.gemm.loads import Sources
from bipolar_jax.kernels.sm90.gemm.problem import Work


def scratch_of(work: Work, sources: Sources) -> dict:
    """By the names that the warpgroups know it by. Raises ValueError if it does not fit."""
    tiling = work.tiling
    empty = functools.partial(plgpu.Barrier, num_arrivals=work.consumers_of_tile)
    if tiling.cluster_size > 1:
        axes = [name for name in ("cluster_m", "cluster_n") if getattr(tiling, name) > 1]
        empty = functools.partial(
            plgpu.ClusterBarrier, collective_axes=tuple(axes), num_arrivals=work.consumers_of_tile
        )
    blocks = tiling.block_m, tiling.block_n
    column_pieces = len(work.loaded_columns(0))
    token_terms, column_terms = sources.terms
    group_terms = _group_slots(work, sources.group_terms)
    group_bytes = sum(4 * math.prod(slots.shape[1:]) for slots in jax.tree.leaves(group_terms))
    tiling.check(group_bytes)
    if work.clusters < 1:
        raise ValueError(f"{tiling} needs clusters of {tiling.cluster_size} blocks: allow as many")
    return _staging(work, sources, tiling.staging_slots(group_bytes)) | dict(
        tiles=tuple(
            plgpu.SMEM((tiling.slots, block, WORDS_PER_ROW), jnp.uint32, transforms=wgmma.TILE_TRANSFORMS)
            for block in blocks
        ),
        group_terms=group_terms,
        # One buffer for every tile in progress.
        terms=tuple(
            jax.tree.map(lambda term, block=block: plgpu.SMEM((work.tiles_at_a_time, block), term.dtype), some)
            for some, block in zip(sources.terms, blocks, strict=True)
        ),
        full=plgpu.Barrier(
            num_arrivals=1 + column_pieces + len(jax.tree.leaves(sources.group_terms)),
            num_barriers=tiling.slots * work.tiles_at_a_time,
        ),
        empty=empty(num_barriers=tiling.slots),
        terms_full=plgpu.Barrier(
            num_arrivals=len(jax.tree.leaves(token_terms)) + column_pieces * len(jax.tree.leaves(column_terms)),
            num_barriers=work.tiles_at_a_time,
        ),
        terms_empty=plgpu.Barrier(num_arrivals=work.consumers_of_tile, num_barriers=work.tiles_at_a_time),
    )


def _staging(work: Work, sources: Sources, slots: int) -> dict:
    """Slots that the output leaves by, and barriers of them where something arrives there before."""
    if work.as_signs:
        return {}
    arrives = sources.residual is not None
    width = math.gcd(work.out_tile_n, chunk_columns(work.dtype))
    if work.heads is not None:
        arrives = sources.heads["tables"] is not None
        fit, width = work.heads.staging_slots(slots), work.heads.half
        slots = work.heads.pieces(work.tiling.tile_m, work.tiling.tile_n)
        if fit < slots:
            raise ValueError(f"{work.tiling} has shared memory for {fit} of {slots} halves of heads: use fewer slots")
    consumers = work.tiling.consumers
    staging = plgpu.SMEM(
        (consumers, slots, ROWS_PER_INSTRUCTION, width),
        work.dtype,
        transforms=staging_transforms(width, work.dtype),
    )
    return {"staging": staging} | ({"arrived": plgpu.Barrier(num_barriers=consumers * slots)} if arrives else {})


def _group_slots(work: Work, terms: GroupTerms | None) -> GroupTerms | None:
    """Slots in shared memory for those terms of groups that there are."""
    if terms is None:
        return None
    block_m, block_n = work.tiling.block_m, work.tiling.block_n
    sizes = {"scale": block_n, "offset": block_n, "token_sums": block_m}
    return GroupTerms(
        **{
            name: plgpu.SMEM((work.tiling.slots, work.groups_per_step, sizes[name]), jnp.float32)
            for name, term in vars(terms).items()
            if term is not None
        }
    )
