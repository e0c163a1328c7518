"""How the threads of a block add up their sums of attention, for a warpgroup of simulated ones."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_attention import reduce
from bipolar_jax.kernels.sm90.decode_attention.config import MASKED_SCORE, ROWS, plan_attention
from tests.support import warpgroup_simulator

THREAD = np.arange(128, dtype=np.int32)
ROW, GROUP = THREAD // 8, THREAD % 8


FIRST_HEAD, HEADS = 2, 5


@pytest.mark.parametrize(("head_dim", "bits"), [(128, None), (80, 8), (256, 8)])
@pytest.mark.parametrize(("splits", "warpgroups", "count"), [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2)])
def test_rows_warps_and_blocks_are_added_up(head_dim, bits, splits, warpgroups, count, monkeypatch):
    """Of the block's two queries `count` exist; nothing else is stored."""
    warpgroup_simulator.install(monkeypatch)
    plan = plan_attention(1, 2, 1, 64, head_dim, jnp.uint8 if bits else jnp.bfloat16, bits)
    plan, rng = dataclasses.replace(plan, splits=splits, warpgroups=warpgroups), np.random.default_rng(0)
    context = np.zeros((HEADS, head_dim), np.float32)
    by_block = np.zeros((HEADS, splits, head_dim), np.float32), np.zeros((HEADS, splits, 2), np.float32)
    targets = [ptx.pointer(array, ptx.GLOBAL) for array in (by_block if splits > 1 else [context])]
    element = np.arange(plan.half // 8)
    columns = element // plan.layout_vector * 8 * plan.layout_vector + element % plan.layout_vector
    parts = (splits, warpgroups, 2, ROWS)
    score, weight, zeros = (rng.standard_normal(parts).astype(np.float32) for _ in range(3))
    weight = np.abs(weight)
    values = rng.standard_normal((*parts, head_dim)).astype(np.float32)
    for rank in range(splits):
        shared = np.zeros((plan.totals, 2, head_dim), np.float32), np.zeros((plan.totals, 2, 2), np.float32)
        shared[1][4 * warpgroups :, :, 0] = MASKED_SCORE  # on tensor cores the new token's
        for warpgroup, query in np.ndindex(warpgroups, 2):
            totals = [ptx.pointer(array[4 * warpgroup : 4 * warpgroup + 4], ptx.SHARED) for array in shared]
            of_query = values[rank, warpgroup, query]
            halves = [
                [of_query[ROW, half * plan.half + GROUP * plan.layout_vector + column] for column in columns]
                for half in range(2)
            ]
            terms = [
                term[rank, warpgroup, query][ROW] for term in ((score, weight, zeros) if bits else (score, weight))
            ]
            reduce.store_rows_of_warp(plan, terms, halves, query, *totals)
        totals = [ptx.pointer(array, ptx.SHARED) for array in shared]
        for warpgroup in range(warpgroups):
            own = [warpgroup_simulator.int32(number) for number in (FIRST_HEAD, rank, count, warpgroup)]
            reduce.store_totals_of_block(plan, *totals, targets, *own, dtype=np.dtype(np.float32))
    for rank, warpgroup in np.ndindex(splits if splits > 1 else 0, warpgroups):
        own = [warpgroup_simulator.int32(number) for number in (FIRST_HEAD, rank, count, warpgroup)]
        target = ptx.pointer(context, ptx.GLOBAL)
        reduce.store_contexts_of_block(plan, *targets, target, *own, dtype=np.dtype(np.float32))
    expected = np.zeros_like(context)
    for query in range(count):
        share = np.exp2(score[:, :, query] - score[:, :, query].max())
        of_query = values[:, :, query] - (zeros[:, :, query, :, None] if bits else 0)
        weight_sum = np.sum(share * weight[:, :, query])
        expected[FIRST_HEAD + query] = np.einsum("bwr,bwre->e", share, of_query) / weight_sum
    np.testing.assert_allclose(context, expected, atol=2e-5 * np.abs(expected).max())
