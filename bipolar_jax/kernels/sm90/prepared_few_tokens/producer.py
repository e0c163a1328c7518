"""The warpgroup that fills the ring of a product of few tokens with prepared weights; and what a block does."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensProblem, FewTokensTiling


class Sources(NamedTuple):
    """Arrays, in the kernel refs in memory.

    Attributes:
      x: uint32 [m, rows, 32], signed bytes of the tokens, or floats as `prepared_weights.token_order` has them.
      words: uint32 [parts, stages, bits, WORDS_PER_VECTOR], prepared weights.
      group_terms: uint32 [parts, stages, vectors, vector_words], or None.
      tokens: terms [m] or more.
      columns: terms [n].
      residual: of the output's shape, before it is cut, and its dtype; or None.
    """

    x: Any
    words: Any
    group_terms: Any
    tokens: TokenTerms
    columns: ColumnTerms
    residual: Any


class Work(NamedTuple):
    """What a block does.

    Attributes:
      units: how many.
      turns: its slots of each unit.
      rank: of the block among those that divide K.
    """

    units: Any
    turns: Any
    rank: Any

    def unit(self, index):
        """The index-th unit."""
        return lax.axis_index("cluster") + index * lax.axis_size("cluster")

    def first_stage(self, index, turn, tiling: FewTokensTiling):
        """The first stage of the slot of a turn of the index-th unit.

        Units begin at different slots: those that blocks read at the same time would else lie whole multiples of a
        part's size apart, 128 KB of 8 bits and K = 4096, of which memory may serve fewer at once.
        """
        slot = lax.rem(turn + self.unit(index), self.turns)
        return (slot * tiling.cluster + self.rank) * tiling.stages


def work_of(problem: FewTokensProblem) -> Work:
    """The work of this block."""
    tiling, rank = problem.tiling, lax.axis_index("rank")
    clusters = lax.axis_size("cluster")
    return Work(
        lax.div(problem.units - lax.axis_index("cluster") + clusters - 1, clusters),
        lax.div(problem.turns - rank + tiling.cluster - 1, tiling.cluster),
        rank,
    )


def next_slot(problem: FewTokensProblem, slot):
    """The slot after this one."""
    return jnp.where(slot + 1 == problem.tiling.slots, 0, slot + 1)


def produce(problem: FewTokensProblem, sources: Sources, work: Work, rings, barriers) -> None:
    """Fills the ring: a slot for every unit and turn."""
    tiling, (x_ring, words_ring, terms_ring), (full, empty) = problem.tiling, rings, barriers

    def load_weights(index, turn, slot):
        # Parts and stages beyond the arrays come as zeros.
        parts, first = pl.ds(work.unit(index) * tiling.parts, tiling.parts), work.first_stage(index, turn, tiling)
        copies = [(sources.words.at[parts, pl.ds(first, tiling.stages)], words_ring.at[slot])]
        if terms_ring is not None:
            copies.append((sources.group_terms.at[parts, pl.ds(first, problem.term_stages)], terms_ring.at[slot]))
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

    def load_unit(index, carry):
        def load_slot(turn, carry):
            step, slot = carry

            @when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            load_weights(index, turn, slot)
            rows = pl.ds(work.first_stage(index, turn, tiling) * problem.rows_of_stage, problem.token_rows)
            plgpu.copy_gmem_to_smem(sources.x.at[:, rows], x_ring.at[slot, pl.ds(0, problem.m)], full.at[slot])
            return step + 1, next_slot(problem, slot)

        return lax.fori_loop(0, work.turns, load_slot, carry)

    lax.fori_loop(0, work.units, load_unit, (jnp.int32(0), jnp.int32(0)))
