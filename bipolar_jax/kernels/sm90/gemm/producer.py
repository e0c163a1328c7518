"""The warpgroup that loads."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.wgmma import WORDS_PER_ROW
from bipolar_jax.kernels.sm90.gemm.problem import Work


def produce(work: Work, sources, *, tiles, group_terms, terms, full, empty, terms_full, terms_empty):
    """Fills slots: for every tile, plane pair and block of K a block of each operand; then the tile's terms.

    Args:
      work: the static side.
      sources: refs in memory: the operands, terms of groups or None, terms.
      tiles: slots of both operands, [slots, block_m or block_n, words].
      group_terms: slots of the groups' terms, [slots, groups_per_step, block_n or block_m] each, or None.
      terms: buffers of terms, [tiles_at_a_time, block_m or block_n] each.
      full: barriers of filled slots, see `Work.full_barrier`.
      empty: barriers of emptied slots.
      terms_full: barriers of filled buffers of terms.
      terms_empty: barriers of emptied ones.
    """
    tiling = work.tiling
    # What a row of blocks shares is loaded once and sent to all of them.
    shared_along = ("cluster_n" if tiling.cluster_n > 1 else None, "cluster_m" if tiling.cluster_m > 1 else None)

    def tile(index, carry):
        sequence, m_start, n_start = work.origin(index)
        # Of both operands: (part, first row of it, first in the target, how many) of what is loaded at once. Beyond
        # the rows of a sequence come those of the next one, in tiles that do not store them.
        pieces = ([(sequence, m_start, 0, tiling.block_m)], work.loaded_columns(n_start))

        def load(planes, k_block, carry):
            step, slot = carry

            @pl.when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            barrier = full.at[work.full_barrier(index, slot)]
            for operand, target, plane, rows, rows_of_part, axes in zip(
                sources.operands, tiles, planes, pieces, (work.m, work.n), shared_along, strict=True
            ):
                for part, start, first, size in rows:
                    # target: [slots, block, 32 words]; rows and words beyond the operand come as zeros.
                    plgpu.copy_gmem_to_smem(
                        operand.at[
                            plane,
                            pl.ds(part * rows_of_part + start, size),
                            pl.ds(k_block * WORDS_PER_ROW, WORDS_PER_ROW),
                        ],
                        target.at[slot, pl.ds(first, size)],
                        barrier,
                        collective_axes=axes,
                    )
            if group_terms is not None:
                group = k_block * work.groups_per_step // work.steps_per_group
                for name, target in vars(group_terms).items():
                    if target is not None:
                        start = m_start if name == "token_sums" else n_start
                        # target.at[slot]: [groups_per_step, block]
                        plgpu.copy_gmem_to_smem(
                            vars(sources.group_terms)[name].at[
                                pl.ds(group, work.groups_per_step), pl.ds(start, target.shape[2])
                            ],
                            target.at[slot],
                            barrier,
                        )
            return step + 1, work.next_slot(slot)

        for _, pairs in work.recovery.pair_groups():
            for planes in pairs:
                carry = lax.fori_loop(0, work.k_blocks, functools.partial(load, planes), carry)

        # Last, as the epilogue wants them last, and as their buffer is surely free by now.
        buffer = work.buffer(index)

        @pl.when(index >= work.tiles_at_a_time)
        def _():
            plgpu.barrier_wait(terms_empty.at[buffer])

        for some_sources, buffers, some_pieces in zip(sources.terms, terms, pieces, strict=True):
            for source, target in zip(jax.tree.leaves(some_sources), jax.tree.leaves(buffers), strict=True):
                for part, start, first, size in some_pieces:
                    some = target.at[buffer, pl.ds(first, size)]
                    plgpu.copy_gmem_to_smem(source.at[part, pl.ds(start, size)], some, terms_full.at[buffer])
        return carry

    lax.fori_loop(0, work.my_tiles(), tile, (jnp.int32(0), jnp.int32(0)))
