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
@pytest.mark.parametrize(("splits", "count"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_rows_warps_and_blocks_are_added_up(head_dim, bits, splits, count, monkeypatch):
    """Of the block's two queries `count` exist; nothing else is stored."""
    warpgroup_simulator.install(monkeypatch)
    plan = plan_attention(1, 2, 1, 64, head_dim, jnp.uint8 if bits else jnp.bfloat16, bits)
    plan, rng = dataclasses.replace(plan, splits=splits), np.random.default_rng(0)
    context = np.zeros((HEADS, head_dim), np.float32)
    by_block = np.zeros((HEADS, splits, head_dim), np.float32), np.zeros((HEADS, splits, 2), np.float32)
    targets = [ptx.pointer(array, ptx.GLOBAL) for array in (by_block if splits > 1 else [context])]
    element = np.arange(plan.half // 8)
    columns = element // plan.layout_vector * 8 * plan.layout_vector + element % plan.layout_vector
    score, weight, zeros = (rng.standard_normal((splits, 2, ROWS)).astype(np.float32) for _ in range(3))
    weight = np.abs(weight)
    values = rng.standard_normal((splits, 2, ROWS, head_dim)).astype(np.float32)
    for rank in range(splits):
        shared = np.zeros((plan.totals, 2, head_dim), np.float32), np.zeros((plan.totals, 2, 2), np.float32)
        shared[1][4:, :, 0] = MASKED_SCORE  # on tensor cores the new token's
        totals = [ptx.pointer(array, ptx.SHARED) for array in shared]
        for query in range(2):
            of_query = values[rank, query]
            halves = [
                [of_query[ROW, half * plan.half + GROUP * plan.layout_vector + column] for column in columns]
                for half in range(2)
            ]
            terms = [term[rank, query][ROW] for term in ((score, weight, zeros) if bits else (score, weight))]
            reduce.store_rows_of_warp(plan, terms, halves, query, *totals)
        own = [warpgroup_simulator.int32(number) for number in (FIRST_HEAD, rank, count)]
        reduce.store_totals_of_block(plan, *totals, targets, *own, dtype=np.dtype(np.float32))
    for rank in range(splits if splits > 1 else 0):
        own = [warpgroup_simulator.int32(number) for number in (FIRST_HEAD, rank, count)]
        target = ptx.pointer(context, ptx.GLOBAL)
        reduce.store_contexts_of_block(plan, *targets, target, *own, dtype=np.dtype(np.float32))
    expected = np.zeros_like(context)
    for query in range(count):
        share = np.exp2(score[:, query] - score[:, query].max())
        of_query = values[:, query] - (zeros[:, query, :, None] if bits else 0)
        expected[FIRST_HEAD + query] = np.einsum("br,bre->e", share, of_query) / np.sum(share * weight[:, query])
    np.testing.assert_allclose(context, expected, atol=2e-5 * np.abs(expected).max())
