"""Tiles of keys and values and the new token on the tensor cores, for a warpgroup of simulated threads."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_attention import new_token, reduce, tiles
from bipolar_jax.kernels.sm90.decode_attention.config import START_SCORE, plan_attention
from tests.support import warpgroup_simulator


def as_words(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers).view(np.uint32)


def as_tile(rows: np.ndarray) -> np.ndarray:
    """[64, head_dim] as TMA stores it: blocks of [8, 64], in whose row r segment s of 8 elements is the (s ^ r)-th."""
    blocks = rows.reshape(8, 8, -1, 8, 8).transpose(0, 2, 1, 3, 4)
    swizzled = np.empty_like(blocks)
    for row in range(8):
        swizzled[:, :, row, np.arange(8) ^ row] = blocks[:, :, row]
    return as_words(swizzled)


@pytest.mark.parametrize(
    ("kind", "head_dim", "queries", "alibi"),
    [("bf16", 128, 4, False), ("f16", 64, 8, True), ("bf16", 64, 1, False)],
)
def test_threads_attend_to_a_token_and_two_tiles(kind, head_dim, queries, alibi, monkeypatch):
    """The second tile begins with the last positions of the first, and ends beyond what is seen; a warp counts none."""
    warpgroup_simulator.install(monkeypatch)
    dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[kind]
    plan = plan_attention(1, queries, 1, 128, head_dim, jnp.bfloat16, None, warpgroups=1)
    plan, rng = dataclasses.replace(plan, splits=1), np.random.default_rng(0)
    assert plan.on_tensor_cores
    assert plan.queries == queries
    heads = rng.standard_normal((queries + 2, head_dim)).astype(dtype)
    angles = rng.standard_normal(plan.half).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    keys, values = (rng.standard_normal((112, head_dim)).astype(dtype) for _ in range(2))
    slopes = rng.random(queries).astype(np.float32) / 16 if alibi else np.zeros(queries, np.float32)
    seen, firsts = 64 + 45, (0, 48)
    values[seen:] = 6e4  # whatever the cache holds beyond a text
    number = warpgroup_simulator.int32
    wide_slopes = [np.full(128, x, np.float32) for x in slopes] if alibi else []
    # The token: queries, key and value are heads of one array.
    rows = np.zeros((new_token.STAGED_ROWS, plan.staged_bytes // 2), dtype)
    staged = ptx.pointer(as_words(rows), ptx.SHARED)
    sources, tables = [ptx.pointer(as_words(heads), ptx.GLOBAL)] * 3, [ptx.pointer(x, ptx.GLOBAL) for x in (cos, sin)]
    indices = [number(x) for x in (0, queries - 1, queries, queries + 1)]
    new_token.stage_token_of_warp(plan, kind, staged, sources, *indices, tables)
    totals, terms = np.zeros((5, queries, head_dim), np.float32), np.zeros((5, queries, 2), np.float32)
    own = [ptx.pointer(array[4], ptx.SHARED) for array in (totals, terms)]
    length, share = (np.full(128, x, np.float32) for x in (seen, 1))
    new_token.store_token_total_of_warp(plan, kind, staged, *own, length, share, wide_slopes)
    entered = [np.zeros(head_dim, dtype) for _ in range(2)]
    new_token.enter_cache_of_warp(plan, staged, [ptx.pointer(as_words(array), ptx.GLOBAL) for array in entered])
    # The tiles.
    before = warpgroup_simulator.bank_conflicts[0]
    own_rows = tiles.load_queries_of_warp(plan, staged)
    largest, weight = np.full(128, START_SCORE, np.float32), np.zeros(128, np.float32)
    sums = [np.zeros(128, np.float32)] * (head_dim // 4)
    slope = tiles.of_own_query(wide_slopes) if alibi else None
    for tile, first in enumerate(firsts):
        own_keys, own_values = (ptx.pointer(as_tile(array[first : first + 64]), ptx.SHARED) for array in (keys, values))
        scores = tiles.scores_of_warp(plan, kind, own_rows, own_keys)
        words = tiles.load_values_of_warp(plan, own_values)
        state = (largest, weight, sums, scores, number(first), number(64 * tile), number(seen), slope)
        largest, weight, sums, weights = tiles.weigh_of_warp(plan, kind, *state)
        sums = tiles.add_values_of_warp(kind, sums, weights, words)
    assert warpgroup_simulator.bank_conflicts[0] == before
    shared = [ptx.pointer(array, ptx.SHARED) for array in (totals, terms)]
    tiles.store_tile_sums_of_warp(plan, largest, weight, sums, *shared)
    context = np.zeros((queries, head_dim), np.float32)
    own = [number(0), number(0), number(queries), number(0)]
    reduce.store_totals_of_block(plan, *shared, [ptx.pointer(context, ptx.GLOBAL)], *own, dtype=np.dtype(np.float32))
    first, second = np.split(heads[:-1].astype(np.float32), 2, axis=1)
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1).astype(dtype)
    np.testing.assert_array_equal(entered[0], rotated[-1])
    np.testing.assert_array_equal(entered[1], heads[-1])
    all_keys = np.concatenate([keys[:seen], rotated[-1:]]).astype(np.float64)
    all_values = np.concatenate([values[:seen], heads[-1:]]).astype(np.float64)
    scores = rotated[:-1].astype(np.float64) @ all_keys.T * np.log2(np.e) / np.sqrt(head_dim)
    scores += slopes[:, None] * np.arange(seen + 1)
    weights = np.exp2(scores - scores.max(1, keepdims=True))
    expected = weights / weights.sum(1, keepdims=True) @ all_values
    # Weights are rounded to 16 bits.
    np.testing.assert_allclose(context, expected, atol=4 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected).max())
