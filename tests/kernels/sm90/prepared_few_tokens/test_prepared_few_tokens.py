"""The product of few tokens with prepared weights: exact in interpret mode with no races, simulated, and compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import tokens_product
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.prepared_few_tokens import threads
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_integers, few_tokens_product
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    FewTokensProblem,
    FewTokensTiling,
)
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import CHUNK_WORDS, PARTS, WORDS_PER_VECTOR
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
A8 = BipolarFormat(8)
INTERPRET, NO_RACES = (plgpu.InterpretGPUParams(detect_races=races) for races in (True, False))


def weights(bits: int, group_size: int | None, n: int, k: int):
    """A `BipolarArray` of unit scales, and the integers that it stands for."""
    fmt, ones = BipolarFormat(bits), np.ones(n, np.float32)
    if group_size is None:
        codes = random_codes(fmt, n, k, 1)
        return array_of_codes(codes, fmt, ones), 2 * codes.astype(np.int64) - fmt.max_value
    groups = random_groups(fmt, n, k, group_size)
    return array_of_groups(groups, fmt, ones), groups.values


@pytest.mark.parametrize(
    ("bits", "group_size", "m", "n", "k", "tiling", "gated"),
    [
        # Three units a block, more turns than slots, stages and tokens beyond the arrays.
        (4, 128, 3, 150, 1700, FewTokensTiling(1, parts=1, depth=1, slots=2), False),
        # Idle warps, parts beyond the array, two chunks; positions in the order of floats.
        (3, 16, 11, 200, 300, FewTokensTiling(2, parts=3, depth=1, slots=3), False),
        (2, None, 8, 140, 520, FewTokensTiling(1, parts=2, depth=2, slots=2), True),
        # A cluster: three units, more chunks than blocks, and a block without a turn.
        (1, 64, 18, 300, 130, FewTokensTiling(1, parts=4, slots=2, cluster=2), False),
    ],
    ids=["W4g128", "W3g16", "W2, gated", "W1g64, a cluster"],
)
def test_integer_products_are_exact(bits, group_size, m, n, k, tiling, gated):
    x, (w, values) = random_codes(A8, m, k, 0), weights(bits, group_size, n, k)
    found = few_tokens_integers(
        jnp.asarray(x), w.prepare(gated=gated), A8, tiling=tiling, blocks=2, interpret=INTERPRET
    )
    np.testing.assert_array_equal(found[..., 0], (2 * x.astype(np.int64) - A8.max_value) @ values.T)
    assert not races_found()


@pytest.mark.parametrize(
    ("activation", "warpgroups"),
    [
        (None, 1),  # the residual of one chunk after the other
        (None, 2),  # before the product
        (Activation("gelu"), 1),
        (Activation("silu", gated=True), 1),
    ],
    ids=str,
)
@pytest.mark.sample(2)
def test_numbers_are_those_of_many_tokens(activation, warpgroups):
    (m, n, k), rng = (9, 72, 128), np.random.default_rng(0)
    gated = activation is not None and activation.gated
    w, _ = weights(4, 32, n, k)
    scale, zero_code = rng.random(m, np.float32) / 2**12, rng.integers(0, 256, m).astype(np.int32)
    w = dataclasses.replace(w, scale=rng.random((n, 1), np.float32), offset=rng.random((n, 1), np.float32))
    x, bias = random_codes(A8, m, k, 0), rng.random(n, np.float32)
    tokens = PackedTokens(code_words(jnp.asarray(x), A8, "int8"), scale, zero_code, x.sum(1, dtype=np.int32))
    args = (tokens, w.prepare(gated=gated), A8, bias, jnp.bfloat16)
    tiling = FewTokensTiling(warpgroups, parts=2, slots=2)
    options = {"activation": activation}
    if activation is None:
        options["residual"] = jnp.asarray(rng.standard_normal((m, n)), jnp.bfloat16)
    found = few_tokens_product(*args, **options, tiling=tiling, blocks=2, interpret=INTERPRET)
    assert not races_found()
    tiling = Tiling(64, 128, "split_n", slots=3)
    expected = tokens_product(*args, **options, tiling=tiling, blocks=2, interpret=NO_RACES)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def problem_of(bits, chunks, m, n, k, tiling, *, gated=False, dtype=jnp.int32, activation=None) -> FewTokensProblem:
    recovery = ExpandedRecovery("int8", A8, BipolarFormat(bits), k, True, chunks > 0)
    return FewTokensProblem(m, n, recovery, bits, chunks, gated, activation, jnp.dtype(dtype), tiling)


def swizzled(tokens: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes [tokens, stages, 128] as TMA writes them."""
    rows = tokens.reshape(-1, 8, 16)
    segments = np.arange(8)[None] ^ (np.arange(rows.shape[0]) % 8)[:, None]
    return np.take_along_axis(rows, segments[..., None], axis=1).reshape(tokens.shape)


@pytest.mark.parametrize(
    ("group_size", "tiling"),
    [(64, FewTokensTiling(2, parts=1, depth=1)), (None, FewTokensTiling(2, parts=3, depth=2))],
    ids=["one part", "three parts"],
)
def test_threads_multiply_and_add_up(group_size, tiling, monkeypatch):
    """Lanes of both warpgroups, from slots in shared memory to totals of all warps."""
    bits, m, n, k = 4, 13, 128, 128 * tiling.stages
    w, values = weights(bits, group_size, n, k)
    prepared = w.prepare()
    problem = problem_of(bits, prepared.chunks, m, n, k, tiling)
    x = random_codes(A8, m, k, 0)
    token_bytes = np.array(code_words(jnp.asarray(x), A8, "int8")).view(np.uint8).reshape(m, -1, 128)
    slot = np.zeros((problem.width, problem.token_rows, 128), np.uint8)
    slot[:m, : tiling.stages] = token_bytes
    words, terms = (
        None if array is None else np.array(array).reshape(PARTS, *array.shape[2:])[: tiling.parts].copy()
        for array in (prepared.words, prepared.terms)
    )
    if terms is not None:
        terms = np.pad(terms, ((0, 0), (0, problem.term_stages - tiling.stages), (0, 0), (0, 0)))
    sums = np.full((tiling.workers, 32, 8), -1, np.int32)
    by_block, totals = (np.zeros((2, tiling.rows, 8), np.int32) for _ in range(2))
    warpgroup_simulator.install(monkeypatch)
    before = warpgroup_simulator.bank_conflicts[0]
    zeros = [warpgroup_simulator.int32(0)] * (problem.width)
    mine = [
        threads.multiply_slot(problem, zeros, words, terms, swizzled(slot), warpgroup_simulator.int32(warpgroup))
        for warpgroup in range(tiling.warpgroups)
    ]
    assert warpgroup_simulator.bank_conflicts[0] == before
    expected = (x.astype(np.int64) - 128) @ (values + 128 if group_size else (values + 15) // 2).T
    for chunk in range(problem.token_chunks):
        for warpgroup, own in enumerate(mine):
            threads.hand_over(problem, own, chunk, sums, warpgroup_simulator.int32(warpgroup))
        threads.add_up(problem, sums, by_block, ptx.GLOBAL)
        threads.add_blocks(problem, [by_block, 2 * by_block, by_block], totals)
        totals //= 4
        for part in range(tiling.parts):
            for block in range(2):
                columns = problem.term_column(block, part) + np.arange(16)
                found = totals[block, 16 * part : 16 * part + 16, : min(8, m - 8 * chunk)]
                np.testing.assert_array_equal(found, expected[8 * chunk : 8 * chunk + 8, columns].T)


@pytest.mark.parametrize(("gated", "residual_dtype"), [(False, None), (True, None), (False, ml_dtypes.bfloat16)])
def test_threads_gather_terms_and_store(gated, residual_dtype, monkeypatch):
    """Every number of the output is stored once, by the lane that has its column's terms, plus the residual."""
    m, n = 10, 296
    dtype = np.dtype(np.int32 if residual_dtype is None else residual_dtype)
    problem = problem_of(4, 0, m, n, 256, FewTokensTiling(2, parts=5), gated=gated, dtype=dtype)
    rows = problem.tiling.rows
    out = np.full((m, problem.halves * problem.padded_half), -1, dtype)
    residual = None
    if residual_dtype is not None:
        residual = np.random.default_rng(0).standard_normal(out.shape).astype(residual_dtype)
    source, target = np.arange(n, dtype=np.int32), np.zeros((2, rows), np.int32)
    warpgroup_simulator.install(monkeypatch)
    lane, row_of_warp = np.arange(128) % 32, np.arange(128) // 32 * 16
    for unit in range(problem.units):
        loaded = threads.load_columns(problem, [source], warpgroup_simulator.int32(unit))
        threads.store_columns(loaded, [target])
        for block in range(2):
            for group in range(rows // 64):
                first = 64 * group + row_of_warp + lane // 4
                for chunk in range(problem.token_chunks):
                    numbers = [
                        (target[block, first + 8 * half] + 1000 * (8 * chunk + lane % 4 * 2 + i)).astype(
                            np.int32 if residual is None else np.float32
                        )
                        for half in range(2)
                        for i in range(2)
                    ]
                    index, added = warpgroup_simulator.int32(unit), None
                    if residual is not None:
                        words = threads.load_residual(problem, residual, index, warpgroup_simulator.int32(chunk))
                        which = problem.finished.index((group, block))
                        added = words[4 * which : 4 * which + 4]
                    threads.store_finished(problem, numbers, out, added, index, block, group, chunk)
    found = out.reshape(m, problem.halves, -1)[..., : problem.half].reshape(m, n)
    expected = (np.arange(n) + 1000 * np.arange(m)[:, None]).astype(dtype)
    if residual is not None:
        expected = (expected.astype(np.float32) + residual[:, :n].astype(np.float32)).astype(dtype)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("m", [1, 8, 16, 33, 64])
def test_a_tiling_is_found_for_all_weights(m):
    for bits in range(1, 9):
        for n, k in ((1, 1), (4096, 14336), (28672, 4096), (1000, 33000)):
            for chunks in (0, 1, 8) if bits <= 6 else (0,):
                tiling = few_tokens_tiling(m, n, k, bits, chunks)
                problem = problem_of(bits, chunks, m, n, k, tiling)
                problem.check()
                assert problem.shared_memory_bytes <= SHARED_MEMORY_BYTES


def test_tilings_read_each_weight_once_in_even_shares():
    """4096 columns are 128 parts for 132 blocks; of 28672 a block has 7 parts, with many tokens at once."""
    assert few_tokens_tiling(1, 4096, 14336, 4, 1).parts == 1
    assert few_tokens_tiling(1, 28672, 4096, 4, 1).parts == 1
    assert few_tokens_tiling(64, 28672, 4096, 4, 1).parts == 7
    # Clusters of two save a tenth of 5 rounds, and exchange sums in each of 9.
    assert few_tokens_tiling(4, 18944, 28672, 4, 1).cluster == 1
    shared = few_tokens_tiling(64, 4096, 14336, 4, 1)
    assert (shared.cluster, shared.parts) == (4, 5)  # 26 units: 32 clusters of four do not run at once


def test_what_does_not_fit_is_refused():
    w = weights(4, None, 128, 128)[0].prepare()
    codes = np.zeros((65, 128), np.uint8)
    with pytest.raises(ValueError, match="from 1 to 64 tokens are multiplied, not 65"):
        few_tokens_integers(jnp.asarray(codes), w, A8)
    with pytest.raises(ValueError, match="a part a warp at most"):
        few_tokens_integers(jnp.asarray(codes[:1]), w, A8, tiling=FewTokensTiling(1, parts=5))
    with pytest.raises(ValueError, match="use fewer slots or parts"):
        few_tokens_integers(jnp.asarray(codes[:64]), w, A8, tiling=FewTokensTiling(4, slots=8))
    sums = jnp.zeros(1, jnp.int32)
    tokens = PackedTokens(jnp.zeros((1, 1, 32), jnp.uint32), jnp.ones(1), sums, sums)
    with pytest.raises(ValueError, match="of an array that is prepared with gated=True"):
        few_tokens_product(tokens, w, A8, None, jnp.bfloat16, activation=Activation("silu", gated=True))


def compiled(bits, group_size, m, n, k, *, gated=False, dtype=jnp.bfloat16, adds=False):
    tiles, stages = n // 128, k // 128
    terms = None
    if group_size is not None:
        chunks = 128 // np.gcd(group_size, 128)
        terms = jax.ShapeDtypeStruct((tiles, PARTS, stages, chunks, CHUNK_WORDS), jnp.uint32)
    words = jax.ShapeDtypeStruct((tiles, PARTS, stages, bits, WORDS_PER_VECTOR), jnp.uint32)
    scale, sums = (jax.ShapeDtypeStruct((n, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    w = PreparedArray(words, terms, scale, sums, BipolarFormat(bits), k, -2, group_size, gated)
    activation = Activation("silu", gated=True) if gated else None
    vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)  # noqa: E731
    tokens = PackedTokens(
        jax.ShapeDtypeStruct((1, m, k // 4), jnp.uint32),
        vector(m, jnp.float32),
        vector(m, jnp.int32),
        vector(m, jnp.int32),
    )

    residual = jax.ShapeDtypeStruct((m, n), dtype) if adds else None

    def multiply(tokens, w, bias, residual):
        return few_tokens_product(tokens, w, A8, bias, dtype, activation=activation, residual=residual)

    return sm90_compile.compile_for_h200(multiply, tokens, w, vector(n, jnp.float32), residual, ptx=True)[1]


@needs_compiler
@pytest.mark.parametrize(
    ("bits", "group_size", "m", "n", "k", "options"),
    [
        (4, 128, 1, 4096, 14336, dict(adds=True)),
        (4, 128, 16, 4096, 14336, dict(adds=True)),
        (4, 128, 32, 4096, 4096, dict(adds=True)),
        (6, 16, 16, 4096, 14336, dict(dtype=jnp.float32)),
        (3, 64, 64, 28672, 4096, dict(gated=True)),
        (1, 128, 32, 28672, 4096, {}),
        (8, None, 64, 4096, 14336, dict(adds=True)),
    ],
    ids=[
        "one token",
        "16 tokens",
        "32 tokens",
        "W6, 16 tokens",
        "W3, gated",
        "W1, 32 tokens",
        "W8, 64 tokens, a cluster",
    ],
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, m, n, k, options):
    report = compiled(bits, group_size, m, n, k, **options)
    assert len(report.registers) == 1
    chunks = 0 if group_size is None else 128 // group_size or 1
    warpgroups = few_tokens_tiling(m, n, k, bits, chunks, options.get("gated", False)).warpgroups
    # setmaxnreg waits for registers that the block has not.
    assert PRODUCER_REGISTERS + warpgroups * CONSUMER_REGISTERS[warpgroups] <= report.registers[0] * (warpgroups + 1)
    assert report.spill_bytes == report.stack_bytes == 0
    assert "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32" in report.text
