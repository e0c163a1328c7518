"""From the sums of rows to the answer: over the rows of a warpgroup, and over the blocks of a cluster."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, AttentionPlan
from bipolar_jax.kernels.sm90.decode_attention.steps import Halves, Sums, to_columns


class Total(NamedTuple):
    """Sums of all rows: the largest score, the weight and the numbers, scaled by 2^largest."""

    largest: Float[Array, ""]
    weight: Float[Array, ""]
    halves: Halves

    def context(self) -> Halves:
        return tuple(half / self.weight for half in self.halves)


def sum_rows(plan: AttentionPlan, sums: Sums, staging) -> Total:
    """Sums over the rows of a warpgroup.

    Args:
      staging: [16, head_dim] in shared memory, float32.
    """
    largest = jnp.max(sums.largest, axis=0)
    share = jnp.exp2(sums.largest - largest)
    factor = to_columns(plan, share)
    zeros = None if sums.zeros is None else to_columns(plan, sums.zeros)
    for part, half in enumerate(sums.halves):
        staging[:, _half(plan, part)] = (half if zeros is None else half - zeros) * factor
    halves = tuple(jnp.sum(_load_rows(plan, staging, part), axis=0) for part in range(2))
    return Total(largest, jnp.sum(sums.weight * share, axis=0), halves)


def store_total(plan: AttentionPlan, total: Total, sums, terms, at: tuple, rank) -> None:
    """Hands a total to the other blocks of the cluster.

    Args:
      total: of this block.
      sums, terms: [batch, heads, 16, head_dim] and [batch, heads, 2, 16] in global memory.
      at: sequence and head.
      rank: of this block.
    """
    for part, half in enumerate(total.halves):
        sums[*at, rank, _half(plan, part)] = half
    terms[*at, 0, rank] = total.largest
    terms[*at, 1, rank] = total.weight


def load_total(plan: AttentionPlan, sums, terms, at: tuple) -> Total:
    """Sums over the totals of all blocks; rows beyond their number hold anything."""
    rows = plan.sums_layout.reduce(1)
    there = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=rows) < plan.splits

    def load(term):
        return plgpu.load(terms.at[*at, term], layout=rows, optimized=False)

    scores = jnp.where(there, load(0), -jnp.inf)
    largest = jnp.max(scores, axis=0)
    share = jnp.exp2(scores - largest)
    weight = jnp.sum(jnp.where(there, load(1), 0.0) * share, axis=0)
    factor, wanted = _to_columns(plan, share), _to_columns(plan, there)
    halves = tuple(
        jnp.sum(jnp.where(wanted, _load_rows(plan, sums.at[*at], part), 0.0) * factor, axis=0) for part in range(2)
    )
    return Total(largest, weight, halves)


def publish(*, emulate: bool) -> None:
    """What this thread wrote to global memory, and what it has seen, is there for the other blocks.

    The barriers of a cluster order a block's own accesses only; on both sides of them this orders the others' with
    them. Interpret mode, which knows no inline code, has nothing to order.
    """
    if emulate:
        return

    @plgpu.inline_mgpu()
    def fence(_):
        inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)

    fence()


def _half(plan: AttentionPlan, part: int) -> pl.Slice:
    return pl.ds(part * plan.half, plan.half)


def _load_rows(plan: AttentionPlan, ref, part: int) -> Float[Array, "rows half"]:
    return plgpu.load(ref.at[:, _half(plan, part)], layout=plan.sums_layout, optimized=False)


def _to_columns(plan: AttentionPlan, rows: Array) -> Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(rows, (ROWS, plan.half), (0,)), plan.sums_layout)
