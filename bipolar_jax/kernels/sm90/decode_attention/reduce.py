"""Reduces the rows' softmax sums: over the rows of a warpgroup, then over the blocks of a cluster."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, AttentionPlan
from bipolar_jax.kernels.sm90.decode_attention.steps import Halves, Sums, to_columns


class Total(NamedTuple):
    """Sums over rows: the largest score, and the sums of weights and of weighted values, in units of 2^largest."""

    largest: Float[Array, ""]
    weight: Float[Array, ""]
    halves: Halves

    def context(self) -> Halves:
        """The attention's output."""
        return tuple(half / self.weight for half in self.halves)


def sum_rows(plan: AttentionPlan, sums: Sums, staging) -> Total:
    """Sums over the rows of a warpgroup.

    Args:
      plan: of the kernel.
      sums: of this warpgroup.
      staging: [ROWS, head_dim] in shared memory, float32.
    """
    largest = jnp.max(sums.largest, axis=0)
    share = jnp.exp2(sums.largest - largest)
    factor = to_columns(plan, share)
    zeros = None if sums.zeros is None else to_columns(plan, sums.zeros)
    for i, half in enumerate(sums.halves):
        staging[:, _half(plan, i)] = (half if zeros is None else half - zeros) * factor
    halves = tuple(jnp.sum(_load_rows(plan, staging, i), axis=0) for i in range(2))
    return Total(largest, _sum_over_warps(sums.weight * share), halves)


def store_total(plan: AttentionPlan, total: Total, sums, terms, at: tuple, rank) -> None:
    """Stores a total for the other blocks of the cluster.

    Args:
      plan: of the kernel.
      total: of this block.
      sums, terms: [batch, heads, ROWS, head_dim] and [batch, heads, 2, ROWS] in global memory.
      at: sequence and head.
      rank: of this block among those that divide the sequence.
    """
    for i, half in enumerate(total.halves):
        sums[*at, rank, _half(plan, i)] = half
    terms[*at, 0, rank] = total.largest
    terms[*at, 1, rank] = total.weight


def load_total(plan: AttentionPlan, sums, terms, at: tuple) -> Total:
    """Sums the totals of all blocks; rows beyond their number are undefined."""
    rows = plan.sums_layout.reduce(1)
    exists = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=rows) < plan.splits

    def load(term):
        return plgpu.load(terms.at[*at, term], layout=rows, optimized=False)

    scores = jnp.where(exists, load(0), -jnp.inf)
    largest = jnp.max(scores, axis=0)
    share = jnp.exp2(scores - largest)
    weight = _sum_over_warps(jnp.where(exists, load(1), 0.0) * share)
    factor, exists = _to_columns(plan, share), _to_columns(plan, exists)
    halves = tuple(
        jnp.sum(jnp.where(exists, _load_rows(plan, sums.at[*at], i), 0.0) * factor, axis=0) for i in range(2)
    )
    return Total(largest, weight, halves)


def _sum_over_warps(products: Float[Array, " rows"]) -> Float[Array, ""]:
    """The sum of products that are not negative.

    Lanes of a warp write their sums of its rows to one address. The maximum keeps the compiler from fusing a lane's own
    product with an addition: the lanes' sums would differ in the last place.
    """
    return jnp.sum(jnp.maximum(products, 0.0), axis=0)


def _half(plan: AttentionPlan, i: int) -> pl.Slice:
    return pl.ds(i * plan.half, plan.half)


def _load_rows(plan: AttentionPlan, ref, i: int) -> Float[Array, "rows half"]:
    return plgpu.load(ref.at[:, _half(plan, i)], layout=plan.sums_layout, optimized=False)


def _to_columns(plan: AttentionPlan, rows: Array) -> Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(rows, (ROWS, plan.half), (0,)), plan.sums_layout)
