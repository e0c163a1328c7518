"""Few float tokens with prepared weights: exact but for float32 sums; interpreted, simulated, and compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.prepared_few_tokens import float_threads
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_floats
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    FewTokensProblem,
    FewTokensTiling,
    FloatTokens,
)
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from bipolar_jax.kernels.sm90.prepared_weights.token_order import token_words
from bipolar_jax.packing.fields import PARTS
from tests.packing.float_groups import float_groups, numbers_of
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import normal, random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def weights(fmt: BipolarFormat, group_size: int | None, n: int, k: int):
    """A `BipolarArray`, and its integer values."""
    scale = np.random.default_rng(2).uniform(0.5, 1, n).astype(np.float32)
    if group_size is None:
        codes = random_codes(fmt, n, k, 1)
        return array_of_codes(codes, fmt, scale), 2 * codes.astype(np.int64) - fmt.max_value
    groups = random_groups(fmt, n, k, group_size)
    return array_of_groups(groups, fmt, scale), groups.values


@pytest.mark.parametrize(
    ("fmt", "group_size", "m", "n", "k", "dtype", "tiling", "gated"),
    [
        # Three units a block, more turns than slots, stages and tokens beyond the arrays.
        (BipolarFormat(4), 128, 3, 150, 1700, jnp.bfloat16, FewTokensTiling(1, parts=1, depth=1, slots=2), False),
        # Idle warps, parts beyond the array, two chunks; positions in the order of floats.
        (BipolarFormat(3), 16, 11, 200, 300, jnp.float16, FewTokensTiling(2, parts=3, depth=1, slots=3), False),
        (BipolarFormat(8), None, 8, 140, 520, jnp.bfloat16, FewTokensTiling(1, parts=2, depth=2, slots=2), True),
        # A cluster, and a block without a turn.
        (BipolarFormat(1), 64, 18, 300, 130, jnp.bfloat16, FewTokensTiling(1, parts=4, slots=2, cluster=2), False),
        (TERNARY, 64, 1, 64, 128, jnp.bfloat16, None, False),
    ],
    ids=["W4g128", "W3g16", "W8, gated", "W1g64, a cluster", "ternary"],
)
@pytest.mark.sample(2)
def test_products_are_those_of_the_values(fmt, group_size, m, n, k, dtype, tiling, gated):
    w, values = weights(fmt, group_size, n, k)
    x, bias = jnp.asarray(normal(m, k), dtype), jnp.asarray(normal(n))
    params = plgpu.InterpretGPUParams(detect_races=True)
    found = few_tokens_floats(x, w.prepare(gated=gated), bias, jnp.float32, tiling=tiling, blocks=2, interpret=params)
    assert not races_found()
    w_hat, wide = values * np.asarray(w.scale, np.float64), np.asarray(x, np.float64)
    expected, sizes = wide @ w_hat.T + np.asarray(bias), np.abs(wide) @ np.abs(w_hat).T + np.abs(np.asarray(bias))
    assert found.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(found, np.float64) - expected) <= k * 2.0**-24 * sizes)


@pytest.mark.parametrize(
    ("group_size", "kind", "tiling", "dtype"),
    [
        (64, None, FewTokensTiling(2, parts=1, depth=1), ml_dtypes.bfloat16),
        (16, None, FewTokensTiling(1, parts=2, depth=2), np.float16),
        (None, None, FewTokensTiling(2, parts=3, depth=1), ml_dtypes.bfloat16),
        (128, "zeros", FewTokensTiling(2, parts=1, depth=1), ml_dtypes.bfloat16),
        (32, "offsets", FewTokensTiling(1, parts=2, depth=2), np.float16),
        (16, "scales", FewTokensTiling(1, parts=1, depth=1), ml_dtypes.bfloat16),
    ],
    ids=["one part", "order of floats", "three parts", "zeros", "offsets", "half a step a chunk"],
)
def test_threads_multiply_a_slot(group_size, kind, tiling, dtype, monkeypatch):
    """Lanes of all warpgroups, with tokens of small integers: sums of chunks are exact. No two lanes meet in a bank."""
    fmt, m, n, k = BipolarFormat(4), 13, 128, 128 * tiling.stages
    if kind is None:
        w, values = weights(fmt, group_size, n, k)
    else:
        w = float_groups(fmt, n, k, group_size, kind)
        values = numbers_of(w)
    prepared = w.prepare()
    values = values if kind is None else values / np.asarray(prepared.scale)
    recovery = FloatTokens.of(PTX_TYPES[np.dtype(dtype).name], k, fmt)
    problem = FewTokensProblem(m, n, recovery, 4, prepared.chunks, False, None, jnp.dtype(jnp.float32), tiling, kind)
    x = np.random.default_rng(0).integers(-8, 9, (m, k))
    words = np.array(token_words(jnp.asarray(x.astype(dtype)), prepared.order)).view(np.uint8)
    slot = np.zeros((problem.width, problem.token_rows, 128), np.uint8)
    slot[:m, : 2 * tiling.stages] = words.reshape(m, -1, 128)
    rows = slot.reshape(-1, 8, 16)
    segments = np.arange(8)[None] ^ (np.arange(rows.shape[0]) % 8)[:, None]
    swizzled = np.take_along_axis(rows, segments[..., None], axis=1).reshape(slot.shape)
    fields, terms = (
        None if array is None else np.array(array).reshape(PARTS, *array.shape[2:])[: tiling.parts].copy()
        for array in (prepared.words, prepared.terms)
    )
    if terms is not None:
        terms = np.pad(terms, ((0, 0), (0, problem.term_stages - tiling.stages), (0, 0), (0, 0)))
    warpgroup_simulator.install(monkeypatch)
    before, zero = warpgroup_simulator.bank_conflicts[0], warpgroup_simulator.float32(0)
    mine = [
        float_threads.multiply_slot(
            problem, [zero] * problem.width, fields, terms, swizzled, warpgroup_simulator.int32(warpgroup)
        )
        for warpgroup in range(tiling.warpgroups)
    ]
    assert warpgroup_simulator.bank_conflicts[0] == before
    expected = x @ values.T
    totals = np.zeros((tiling.parts, 2, 16, problem.width))
    lane = np.arange(32)
    for warpgroup, sums in enumerate(mine):
        for warp in range(4):
            index = 4 * warpgroup + warp
            if index >= tiling.workers:
                continue
            for i, number in enumerate(sums):
                block, chunk, half, token = (
                    i // 4 // problem.token_chunks,
                    i // 4 % problem.token_chunks,
                    i % 4 // 2,
                    i % 2,
                )
                own = number.reshape(-1, 32)[warp]
                totals[index % tiling.parts, block, lane // 4 + 8 * half, 8 * chunk + 2 * (lane % 4) + token] += own
    for part in range(tiling.parts):
        for block in range(2):
            columns = problem.term_column(block, part) + np.arange(16)
            found = totals[part, block, :, :m].T / recovery.unit
            if kind is None:
                np.testing.assert_array_equal(found, expected[:, columns])
            else:
                bound = 2 * (k // min(group_size, 64)) * 2.0**-24 * (np.abs(x) @ np.abs(values).T)
                assert np.all(np.abs(found - expected[:, columns]) <= bound[:, columns])


def test_products_with_float_groups_are_those_of_the_numbers():
    m, n, k = 3, 150, 700
    w = float_groups(BipolarFormat(4), n, k, 96, "zeros")
    x, bias = jnp.asarray(normal(m, k), jnp.bfloat16), jnp.asarray(normal(n))
    prepared = dataclasses.replace(w.prepare(), scale=np.full((n, 1), 0.5, np.float32))
    tiling, interpret = FewTokensTiling(1, parts=1, depth=1, slots=2), plgpu.InterpretGPUParams(detect_races=True)
    found = few_tokens_floats(x, prepared, bias, jnp.float32, tiling=tiling, blocks=2, interpret=interpret)
    assert not races_found()
    wide, numbers = np.asarray(x, np.float64), numbers_of(w) / 2
    expected, sizes = wide @ numbers.T + np.asarray(bias), np.abs(wide) @ np.abs(numbers).T + np.abs(np.asarray(bias))
    assert np.all(np.abs(np.asarray(found, np.float64) - expected) <= k * 2.0**-24 * sizes)


@pytest.mark.parametrize("m", [1, 8, 16, 33, 64])
def test_a_tiling_is_found_for_all_weights(m):
    for bits in range(1, 9):
        for n, k in ((1, 1), (4096, 14336), (28672, 4096)):
            integers = [(chunks, None) for chunks in ((0, 1, 8) if bits <= 6 else (0,))]
            for chunks, kind in (*integers, (1, "zeros"), (8, "offsets")):
                tiling = few_tokens_tiling(m, n, k, bits, chunks, float_terms=kind, rows_of_stage=2)
                static = FloatTokens("bf16", k, BipolarFormat(bits)), bits, chunks, False, None
                FewTokensProblem(m, n, *static, jnp.dtype(jnp.bfloat16), tiling, kind).check()


@needs_compiler
@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "m", "dtype"),
    [
        (4, 128, None, 1, jnp.bfloat16),
        (6, 16, None, 16, jnp.float16),
        (1, 128, None, 32, jnp.bfloat16),
        (8, None, None, 64, jnp.bfloat16),
        (4, 128, "zeros", 1, jnp.bfloat16),
        (4, 32, "offsets", 16, jnp.bfloat16),
        (4, 128, "zeros", 64, jnp.float16),
        (8, 64, "offsets", 32, jnp.bfloat16),
        (6, 16, "block_scales", 64, jnp.bfloat16),
        (8, 32, "scales", 64, jnp.bfloat16),
    ],
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, kind, m, dtype):
    n, k = 4096, 1024
    if kind is None:
        w = jax.eval_shape(lambda: weights(BipolarFormat(bits), group_size, 128, k)[0].prepare())
    else:
        w = float_groups(BipolarFormat(bits), 128, k, group_size, kind)
        w = jax.eval_shape(lambda w: w.prepare(float_terms=kind), w)
    w = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n // 128 if a.ndim > 2 else n, *a.shape[1:]), a.dtype), w)
    x, bias = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((n,), jnp.float32)
    residual = jax.ShapeDtypeStruct((m, n), dtype)

    def multiply(x, w, bias, residual):
        return few_tokens_floats(x, w, bias, residual=residual)

    _, report = sm90_compile.compile_for_h200(multiply, x, w, bias, residual, ptx=True)
    assert report.spill_bytes == report.stack_bytes == 0
    chunks = 0 if group_size is None else 128 // group_size
    warpgroups = few_tokens_tiling(m, n, k, bits, chunks, float_terms=kind, rows_of_stage=2).warpgroups
    # setmaxnreg waits for registers that the block has not.
    assert PRODUCER_REGISTERS + warpgroups * CONSUMER_REGISTERS[warpgroups] <= report.registers[0] * (warpgroups + 1)
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{PTX_TYPES[jnp.dtype(dtype).name]}" in report.text
