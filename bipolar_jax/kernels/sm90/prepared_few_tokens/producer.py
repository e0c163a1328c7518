"""The warpgroup that fills the ring of a product of few tokens with prepared weights; and what a block does."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensProblem


class Sources(NamedTuple):
    """Arrays, in the kernel refs in memory.

    Attributes:
      x: uint32 [m, rows, 32], signed bytes of the tokens, or floats as `prepared_weights.float_tokens` has them.
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

    def load_unit(index, carry):
        parts = pl.ds(work.unit(index) * tiling.parts, tiling.parts)

        def load_slot(turn, carry):
            step, slot = carry

            @pl.when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            # Parts and stages beyond the arrays come as zeros.
            first = (turn * tiling.cluster + work.rank) * tiling.stages
            tokens = sources.x.at[:, pl.ds(first * problem.rows_of_stage, problem.token_rows)]
            copies = [
                (sources.words.at[parts, pl.ds(first, tiling.stages)], words_ring.at[slot]),
                (tokens, x_ring.at[slot, pl.ds(0, problem.m)]),
            ]
            if terms_ring is not None:
                copies.append((sources.group_terms.at[parts, pl.ds(first, problem.term_stages)], terms_ring.at[slot]))
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])
            return step + 1, next_slot(problem, slot)

        return lax.fori_loop(0, work.turns, load_slot, carry)

    lax.fori_loop(0, work.units, load_unit, (jnp.int32(0), jnp.int32(0)))
