"""The product of few tokens with prepared weights whose groups have float scales: interpreted, simulated, compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.prepared_few_tokens import threads
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_product
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import CONSUMER_REGISTERS, PRODUCER_REGISTERS, FewTokensTiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from bipolar_jax.kernels.sm90.prepared_weights.token_order import words_in_order
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing.fields import PARTS
from bipolar_jax.packing.float_terms import BLOCK_TERMS
from tests.kernels.sm90.prepared_few_tokens.test_prepared_few_tokens import A8, problem_of, swizzled
from tests.packing.float_groups import float_groups, numbers_of
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

KINDS = ("scales", "zeros", "minimums", "offsets", *BLOCK_TERMS)


def packed(x: np.ndarray, scale: np.ndarray, zero_code: np.ndarray) -> PackedTokens:
    return PackedTokens(code_words(jnp.asarray(x), A8, "int8"), scale, zero_code, x.sum(1, dtype=np.int32))


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "m", "n", "k", "tiling", "gated"),
    [
        # Three units a block, a group that ends within a chunk of half a stage; order of floats, with an activation.
        ("scales", 4, 128, 3, 150, 900, FewTokensTiling(1, parts=1, depth=1, slots=2), False),
        ("zeros", 3, 16, 11, 140, 300, FewTokensTiling(2, parts=3, depth=1, slots=3), True),
        # A cluster: totals are exchanged as floats.
        ("offsets", 8, 96, 9, 300, 260, FewTokensTiling(1, parts=4, slots=2, cluster=2), False),
        # Terms of 320 bytes a stage, of which a slot has an even number.
        ("block_scales", 6, 16, 3, 70, 512, FewTokensTiling(1, parts=3, slots=2), False),
    ],
    ids=["W4g128f", "W3g16f, gated", "W8g96f, a cluster", "Q6_K"],
)
def test_products_are_those_of_the_numbers(kind, bits, group_size, m, n, k, tiling, gated):
    rng, w = np.random.default_rng(0), float_groups(BipolarFormat(bits), n, k, group_size, kind)
    x, zero_code = random_codes(A8, m, k, 0), rng.integers(100, 156, m).astype(np.int32)
    scale, bias = rng.random(m, np.float32) / 64, rng.random(n, np.float32)
    prepared = w.prepare(gated=gated)
    prepared = dataclasses.replace(prepared, scale=0.5 * prepared.scale)
    args = (packed(x, scale, zero_code), prepared, A8, jnp.asarray(bias), jnp.float32)
    activation = Activation("silu", gated=True) if gated else None
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = few_tokens_product(*args, activation=activation, tiling=tiling, blocks=2, interpret=interpret)
    assert not races_found()
    numbers, steps = numbers_of(w), x.astype(np.float64) - zero_code[:, None]
    expected = scale[:, None] * (steps @ numbers.T) + bias
    # Every chunk rounds sums of codes times weights, and so does what the zero code takes away.
    magnitude = scale[:, None] * (
        (np.abs(x - 128.0) + np.abs(zero_code - 128.0)[:, None]) @ np.abs(numbers).T
    ) + np.abs(bias)
    bound = (k / 16) * 2.0**-24 * magnitude
    if gated:
        gates, values = np.split(expected, 2, axis=1)
        expected = gates / (1 + np.exp(-gates)) * values
        by_half = np.split(bound, 2, axis=1)
        bound = 1.1 * by_half[0] * np.abs(values) + np.abs(gates) * by_half[1] + 1e-5 * np.abs(expected) + 1e-5
    assert np.all(np.abs(found - expected) <= bound)


@pytest.mark.parametrize(
    ("kind", "bits", "group_size"),
    [
        ("scales", 8, 128),
        ("zeros", 5, 32),
        ("offsets", 4, 16),
        ("minimums", 4, 32),
        ("block_scales", 3, 16),
        ("block_minimums", 5, 32),
        ("block_nibbles", 2, 16),
    ],
)
def test_threads_multiply_and_add_up(kind, bits, group_size, monkeypatch):
    """Lanes of one warpgroup with codes at their limits: sums are exact, so that numbers differ by roundings alone."""
    tiling, m, k = FewTokensTiling(1, parts=2, depth=1), 13, 256
    fmt = BipolarFormat(bits)
    w = float_groups(fmt, 128, k, group_size, kind)
    prepared = w.prepare()
    problem = problem_of(bits, prepared.chunks, m, 128, k, tiling, dtype=jnp.float32)
    problem = dataclasses.replace(problem, float_terms=kind)
    x = random_codes(A8, m, k, 0)
    x[:3] = np.array([0, 255, 0])[:, None]
    tokens = np.array(words_in_order(code_words(jnp.asarray(x), A8, "int8"), prepared.order)).view(np.uint8)
    slot = np.zeros((problem.width, problem.token_rows, 128), np.uint8)
    slot[:m, : tiling.stages] = tokens.reshape(m, -1, 128)
    words, terms = (
        np.array(array).reshape(PARTS, *array.shape[2:])[: tiling.parts].copy()
        for array in (prepared.words, prepared.terms)
    )
    assert problem.term_stages == tiling.stages
    sums, totals = (np.zeros(shape, np.float32) for shape in ((tiling.workers, 32, 8), (2, tiling.rows, 8)))
    warpgroup_simulator.install(monkeypatch)
    before = warpgroup_simulator.bank_conflicts[0]
    zeros = [np.zeros(128, np.float32)] * problem.width
    zero = warpgroup_simulator.int32(0)
    mine = threads.multiply_slot(problem, zeros, words, terms, swizzled(slot), zero)
    assert warpgroup_simulator.bank_conflicts[0] == before
    numbers = numbers_of(w) / np.asarray(prepared.scale)
    expected = (x - 128.0) @ numbers.T
    bound = 40 * 2.0**-24 * (np.abs(x - 128.0) @ np.abs(numbers).T)
    for chunk in range(problem.token_chunks):
        threads.hand_over(problem, mine, chunk, sums, zero)
        threads.add_up(problem, sums, totals, threads.SHARED)
        for part, block in np.ndindex(tiling.parts, 2):
            columns = problem.term_column(block, part) + np.arange(16)
            found = totals[block, 16 * part : 16 * part + 16, : min(8, m - 8 * chunk)].T
            tokens = slice(8 * chunk, 8 * chunk + 8)
            assert np.all(np.abs(found - expected[tokens, columns]) <= bound[tokens, columns])


@pytest.mark.parametrize("m", [1, 16, 64])
def test_a_tiling_is_found_for_all_weights(m):
    for bits in range(1, 9):
        for n, k in ((1, 1), (28672, 4096)):
            for kind, chunks in (
                (kind, chunks) for kind in KINDS for chunks in (1, 8) if kind not in BLOCK_TERMS or chunks > 1
            ):
                tiling = few_tokens_tiling(m, n, k, bits, chunks, float_terms=kind)
                problem = problem_of(bits, chunks, m, n, k, tiling)
                dataclasses.replace(problem, float_terms=kind).check()


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "m", "n", "k", "gated"),
    [
        ("scales", 4, 128, 1, 4096, 14336, False),
        ("offsets", 8, 32, 64, 28672, 4096, True),
        ("zeros", 4, 128, 64, 4096, 14336, False),
        ("zeros", 4, 32, 16, 28672, 4096, True),
        ("offsets", 6, 16, 16, 4096, 14336, False),
        ("minimums", 4, 32, 16, 28672, 4096, True),
        ("block_scales", 6, 16, 16, 28672, 4096, True),
        ("block_minimums", 4, 32, 64, 4096, 14336, False),
        ("block_nibbles", 2, 16, 64, 28672, 4096, True),
    ],
    ids=str,
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(kind, bits, group_size, m, n, k, gated):
    small = float_groups(BipolarFormat(bits), 4, 256, group_size, kind)
    sizes = {4: n, 8: k // 32, 256 // group_size: k // group_size, 1: k // 256}  # rows, words, groups, blocks

    def large(leaf):
        *planes, rows, columns = leaf.shape
        return jax.ShapeDtypeStruct((*planes, sizes[rows], sizes[columns]), leaf.dtype)

    w = dataclasses.replace(jax.tree.map(large, small), contracted_size=k)
    w = jax.eval_shape(lambda w: w.prepare(gated=gated, float_terms=kind), w)
    shapes = ((1, m, k // 4), jnp.uint32), ((m,), jnp.float32), ((m,), jnp.int32), ((m,), jnp.int32)
    tokens = PackedTokens(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    activation = Activation("silu", gated=True) if gated else None

    residual = None if gated else jax.ShapeDtypeStruct((m, n), jnp.bfloat16)

    def multiply(tokens, w, residual):
        return few_tokens_product(tokens, w, A8, None, jnp.bfloat16, activation=activation, residual=residual)

    _, report = sm90_compile.compile_for_h200(multiply, tokens, w, residual)
    warpgroups = few_tokens_tiling(m, n, k, bits, w.chunks, gated, float_terms=kind).warpgroups
    # setmaxnreg waits for registers that the block has not.
    assert PRODUCER_REGISTERS + warpgroups * CONSUMER_REGISTERS[warpgroups] <= report.registers[0] * (warpgroups + 1)
    assert report.spill_bytes == report.stack_bytes == 0
