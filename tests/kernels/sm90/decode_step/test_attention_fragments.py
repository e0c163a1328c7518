"""What the threads of the fused layers' attention compute, for a warpgroup of simulated ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.sm90.arithmetic.butterflies import rotate_numbers, rotate_vectors, stages_of_vectors
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.decode_step.attention import float_fragments, quantized_fragments
from tests.support import warpgroup_simulator

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
THREAD = np.arange(128, dtype=np.int32)
LANE, WARP = THREAD % 32, THREAD // 32


def words_of(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers).view(np.int32)[..., 0]


@pytest.mark.parametrize(("number", "size"), [("bf16", 128), ("f16", 128), ("bf16", 64)])
def test_scores_are_those_of_float32(number, size, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(0)
    query = np.tile(rng.standard_normal(size).astype(np.float32), 128 // size)
    keys = rng.standard_normal((64, size)).astype(DTYPES[number])
    memory = ptx.pointer(np.full(256, np.nan, np.float32), ptx.SHARED)
    store_query(number, memory, query, size)
    words = float_fragments.load_query(memory, LANE, size // 8)
    rows, pairs = 16 * WARP + LANE // 4, 2 * (LANE % 4)
    blocks = [
        tuple(words_of(np.stack([keys[rows + below, 8 * i + pairs + j] for j in range(2)], axis=1)) for below in (0, 8))
        for i in range(size // 8)
    ]
    expected = keys.astype(np.float64) @ query[:size]
    for below, found in zip((0, 8), float_fragments.scores(number, blocks, words), strict=True):
        np.testing.assert_allclose(found, expected[rows + below], atol=3e-6)


def store_query(number: str, memory, query: np.ndarray, size: int, *, codes: bool = False) -> None:
    with ptx.when(ptx.less(THREAD, size)):
        float_fragments.store_query(number, memory, THREAD, query, codes=codes)


@pytest.mark.parametrize("number", DTYPES)
def test_values_are_summed_by_weights_of_float32(number, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((2, 64, 64)).astype(DTYPES[number])
    weights = rng.random(64).astype(np.float32)
    before = rng.standard_normal(128).astype(np.float32)
    rows = 16 * WARP + LANE // 4
    words = float_fragments.spread_weights(number, [weights[rows], weights[rows + 8]], LANE)
    # The 128-byte swizzle: piece p of 16 bytes of row r is where piece p ^ (r % 8) would be.
    pieces = values.reshape(2, 64, 8, 8)
    swizzled = np.stack([pieces[:, row, np.arange(8) ^ (row % 8)] for row in range(64)], axis=1)
    left = np.zeros((4, 128), np.float32)
    for half in range(2):
        sums = [
            np.where(LANE % 4 == 0, before[64 * half + 16 * (i // 4) + LANE // 4 + 8 * (i % 4 // 2)], 0)
            for i in range(16)
        ]
        sums = [np.where(i % 2 == 0, x, 0).astype(np.float32) for i, x in enumerate(sums)]
        source = ptx.pointer(np.ascontiguousarray(swizzled[half]), ptx.SHARED)
        sums = float_fragments.add_values(number, source, words, LANE, WARP, sums)
        target = ptx.advance(ptx.pointer(left, ptx.SHARED), 512 * WARP.astype(np.int64) + 256 * half)
        float_fragments.store_sums(target, sums, ptx.float32(0.5), LANE)
    by_warp = (weights.reshape(4, 1, 16) @ np.concatenate(values, axis=1).astype(np.float64).reshape(4, 16, 128))[:, 0]
    np.testing.assert_allclose(left, 0.5 * (by_warp + before), atol=3e-6)


def swizzled(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [64, size] as a cache has them, in the swizzle of 128, 64 or 32 bytes."""
    if bits == 4:
        low, high = np.split(codes, 2, axis=1)
        codes = low | (high << 4)
    pieces = codes.reshape(64, -1, 16)
    count = pieces.shape[1]
    rows = [pieces[row, np.arange(count) ^ (row * count // 8 % count)] for row in range(64)]
    return np.stack(rows).reshape(-1).view(np.int32)


@pytest.mark.parametrize("size", [128, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_scores_of_codes_are_those_of_float32(bits, size, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(2)
    query = np.tile(rng.standard_normal(size).astype(np.float32), 128 // size)
    codes = rng.integers(0, 2**bits, (64, size), np.uint8)
    codes[0], codes[9] = 0, 2**bits - 1
    memory = ptx.pointer(np.full(256, np.nan, np.float32), ptx.SHARED)
    store_query("bf16", memory, query, size, codes=True)
    words = float_fragments.load_query(memory, LANE, size // 8)
    source = ptx.pointer(swizzled(codes, bits), ptx.SHARED)
    expected = (codes.astype(np.float64) - 2 ** (bits - 1)) @ query[:size]
    rows = 16 * WARP + LANE // 4
    for below, found in zip((0, 8), quantized_fragments.scores(bits, source, words, LANE, WARP), strict=True):
        np.testing.assert_allclose(found, expected[rows + below], atol=3e-6 * 2**bits)
    np.testing.assert_allclose(
        quantized_fragments.query_sum(words), np.full(128, query[:size].sum(dtype=np.float64)), atol=3e-6
    )


@pytest.mark.parametrize("size", [128, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_values_of_codes_are_summed_by_weights_of_float32(bits, size, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2**bits, (64, size), np.uint8)
    weights = rng.random(64).astype(np.float32)
    rows = 16 * WARP + LANE // 4
    words = float_fragments.spread_weights("bf16", [weights[rows], weights[rows + 8]], LANE)
    sums = [np.zeros(128, np.float32)] * (size // 4)
    sums = quantized_fragments.add_values(bits, ptx.pointer(swizzled(codes, bits), ptx.SHARED), words, LANE, WARP, sums)
    left = np.zeros((4, size), np.float32)
    for tile in range(size // 64):
        target = ptx.advance(ptx.pointer(left, ptx.SHARED), 4 * size * WARP.astype(np.int64) + 256 * tile)
        float_fragments.store_sums(target, sums[16 * tile : 16 * tile + 16], ptx.float32(0.5), LANE, codes=True)
    signed = codes.reshape(4, 16, size).astype(np.float64) - 2 ** (bits - 1)
    np.testing.assert_allclose(left, 0.5 * (weights.reshape(4, 1, 16) @ signed)[:, 0], atol=3e-6 * 2**bits)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_vectors_are_rotated_bit_for_bit(size, monkeypatch):
    warpgroup_simulator.install(monkeypatch)
    vectors = np.random.default_rng(2).standard_normal((2, 128)).astype(np.float32)
    scratch = ptx.pointer(np.full(256, np.nan, np.float32), ptx.SHARED)
    found = rotate_vectors(scratch, list(vectors), size, THREAD)
    np.testing.assert_array_equal(found, Hadamard((size,), 128 // size)(vectors))


@pytest.mark.parametrize(("block", "early"), [(64, 16), (256, 16), (256, 128)])
def test_a_rotation_in_two_parts_is_the_rotation_bit_for_bit(block, early, monkeypatch):
    """Early stages of vectors, one number a thread; the others of a K slice, eight numbers a thread."""
    warpgroup_simulator.install(monkeypatch)
    numbers = np.random.default_rng(block).standard_normal(1024).astype(np.float32)
    scratch = ptx.pointer(np.full(1024, np.nan, np.float32), ptx.SHARED)
    begun = np.ravel(stages_of_vectors(scratch, list(numbers.reshape(8, 128)), early, THREAD))
    ended = rotate_numbers(list(begun.reshape(128, 8).T), block, LANE, first=early)
    np.testing.assert_array_equal(np.transpose(ended).ravel(), Hadamard((block,), 1024 // block)(numbers))
