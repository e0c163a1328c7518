"""Tiles of keys and values on the tensor cores, for a warpgroup of simulated threads."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_attention import reduce, tiles
from bipolar_jax.kernels.sm90.decode_attention.config import plan_attention
from tests.support import warpgroup_simulator


def as_words(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers).view(np.uint32)


@pytest.mark.parametrize(
    ("kind", "head_dim", "queries", "alibi"),
    [("bf16", 128, 4, False), ("f16", 64, 8, True), ("bf16", 64, 1, False)],
)
def test_threads_attend_to_two_tiles(kind, head_dim, queries, alibi, monkeypatch):
    """The second tile begins with the last positions of the first, and ends beyond what is seen; a warp counts none."""
    warpgroup_simulator.install(monkeypatch)
    dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[kind]
    plan = plan_attention(1, queries, 1, 128, head_dim, jnp.bfloat16, None)
    plan, rng = dataclasses.replace(plan, splits=1), np.random.default_rng(0)
    assert plan.on_tensor_cores
    assert plan.queries == queries
    rows = rng.standard_normal((8, head_dim)).astype(dtype)
    keys, values = (rng.standard_normal((112, head_dim)).astype(dtype) for _ in range(2))
    slopes = rng.random(queries).astype(np.float32) / 16 if alibi else None
    seen, firsts = 64 + 45, (0, 48)
    values[seen:] = 6e4  # whatever the cache holds beyond a text
    start = rng.standard_normal(queries).astype(np.float32)
    new = rng.standard_normal(head_dim).astype(np.float32)
    number = warpgroup_simulator.int32
    own_rows = tiles.load_queries_of_warp(plan, ptx.pointer(as_words(rows), ptx.SHARED))
    full = [np.full(128, x, np.float32) for x in start]
    largest, weight = tiles.of_own_query(full), np.zeros(128, np.float32)
    sums = [np.zeros(128, np.float32)] * (head_dim // 4)
    slope = None if slopes is None else tiles.of_own_query([np.full(128, x, np.float32) for x in slopes])
    for tile, first in enumerate(firsts):
        own_keys, own_values = (
            ptx.pointer(as_words(array[first : first + 64]), ptx.SHARED) for array in (keys, values)
        )
        scores = tiles.scores_of_warp(plan, kind, own_rows, own_keys)
        state = (largest, weight, sums, scores, number(first), number(64 * tile), number(seen), slope)
        largest, weight, sums, words = tiles.weigh_of_warp(plan, kind, *state)
        sums = tiles.add_values_of_warp(plan, kind, sums, words, own_values)
    totals, terms = np.zeros((5, queries, head_dim), np.float32), np.zeros((5, queries, 2), np.float32)
    shared = [ptx.pointer(array, ptx.SHARED) for array in (totals, terms)]
    tiles.store_tile_sums_of_warp(plan, largest, weight, sums, *shared)
    totals[4], terms[4, :, 0], terms[4, :, 1] = new, start, 1
    context = np.zeros((queries, head_dim), np.float32)
    own = [number(0), number(0), number(queries)]
    reduce.store_totals_of_block(plan, *shared, [ptx.pointer(context, ptx.GLOBAL)], *own, dtype=np.dtype(np.float32))
    scores = rows[:queries].astype(np.float64) @ keys.astype(np.float64)[:seen].T
    scores = scores * np.log2(np.e) / np.sqrt(head_dim)
    if alibi:
        scores += slopes[:, None] * np.arange(seen)
    scores = np.concatenate([scores, start[:, None]], axis=1)
    weights = np.exp2(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    expected = weights @ np.concatenate([values.astype(np.float64)[:seen], new[None]])
    # Weights are rounded to 16 bits.
    np.testing.assert_allclose(context, expected, atol=4 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected).max())
