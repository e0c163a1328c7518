"""How the threads of a block add up their sums of attention, for a warpgroup of simulated ones."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_attention import reduce
from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, plan_attention
from tests.support import warpgroup_simulator

THREAD = np.arange(128, dtype=np.int32)
ROW, GROUP = THREAD // 8, THREAD % 8


@pytest.mark.parametrize(("head_dim", "bits"), [(128, None), (80, 8), (256, 8)])
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_and_warps_are_added_up(head_dim, bits, splits, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    plan = plan_attention(1, 2, 1, 64, head_dim, jnp.uint8 if bits else jnp.bfloat16, bits)
    plan, rng = dataclasses.replace(plan, splits=splits), np.random.default_rng(0)
    totals, terms = np.zeros((4, 2, head_dim), np.float32), np.zeros((4, 2, 2), np.float32)
    found, found_terms = np.zeros((2, head_dim), np.float32), np.zeros((2, 2), np.float32)
    score, weight, zeros = (rng.standard_normal(ROWS).astype(np.float32) for _ in range(3))
    values = rng.standard_normal((ROWS, head_dim)).astype(np.float32)
    element = np.arange(plan.half // 8)
    columns = element // plan.layout_vector * 8 * plan.layout_vector + element % plan.layout_vector
    halves = [
        [values[ROW, half * plan.half + GROUP * plan.layout_vector + column] for column in columns] for half in range(2)
    ]
    row_terms = [score[ROW], weight[ROW]] + ([zeros[ROW]] if bits else [])
    shared = [ptx.pointer(array, ptx.SHARED) for array in (totals, terms)]
    reduce.store_rows_of_warp(plan, row_terms, halves, 1, *shared)
    sources = [(ptx.pointer(totals[warp, 1], ptx.SHARED), ptx.pointer(terms[warp, 1], ptx.SHARED)) for warp in range(4)]
    targets = [ptx.pointer(found[0], ptx.GLOBAL)] + ([ptx.pointer(found_terms[0], ptx.GLOBAL)] if splits > 1 else [])
    reduce.store_combined(plan, sources, *targets, dtype=jnp.float32)
    share = np.exp2(score - score.max())
    expected = share @ (values - zeros[:, None] if bits else values)
    if splits > 1:
        np.testing.assert_allclose(found_terms[0], [score.max(), share @ weight], rtol=1e-5)
    np.testing.assert_allclose(found[0], expected if splits > 1 else expected / (share @ weight), atol=2e-5)
