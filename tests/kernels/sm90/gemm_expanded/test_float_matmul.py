"""The product of 16-bit floats with weights that are expanded in registers: interpreted, simulated, compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded.floats.arrays import (
    below_powers_of_two,
    float_operands,
    step_operands,
    token_steps,
)
from bipolar_jax.kernels.sm90.gemm_expanded.floats.multiply import FloatMultiplication
from bipolar_jax.kernels.sm90.gemm_expanded.launch import expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedFloatRecovery
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.kernels.sm90.prepared_weights.scaled_floats import ScaledFloatExpansion
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import PARTS, WORDS_PER_VECTOR
from bipolar_jax.packing.float_terms import terms_shape
from tests.packing.float_groups import float_groups, numbers_of
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
A8 = BipolarFormat(8)
SMALL = Tiling(64, 128, "split_n", slots=3, band=2)
RACES = plgpu.InterpretGPUParams(detect_races=True)
LARGE = Tiling(128, 128, "split_n", slots=4)


def weights_of(bits: int, n: int, k: int, group_size: int | None, kind: str | None = None):
    fmt = BipolarFormat(bits)
    if kind is not None:
        return float_groups(fmt, n, k, group_size, kind)
    scale = np.random.default_rng(n).uniform(2.0**-9, 2.0**-8, n).astype(np.float32)
    if group_size is None:
        return array_of_codes(random_codes(fmt, n, k, 0), fmt, scale)
    return array_of_groups(random_groups(fmt, n, k, group_size), fmt, scale)


@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "dtype", "changes", "gated"),
    [
        (4, 32, None, jnp.bfloat16, dict(tile_m=40, cluster_m=2), False),
        (3, 16, None, jnp.float16, dict(schedule="alternate"), True),
        (8, None, None, jnp.bfloat16, dict(tile_m=128, slots=2, splits=2), False),
        (4, 128, "zeros", jnp.bfloat16, dict(), False),
    ],
    ids=["residual, 40 tokens, clusters", "gated, alternating, order of floats", "splits of K", "float groups"],
)
@pytest.mark.sample(1)
def test_products_are_those_of_the_weights(bits, group_size, kind, dtype, changes, gated):
    (m, n, k), rng = (70, 152, 300), np.random.default_rng(0)
    w = weights_of(bits, n, k, group_size, kind)
    x, bias = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=n).astype(np.float32)
    residual = None if gated else rng.normal(size=(m, n)).astype(np.float32)

    @jax.jit
    def product(x, w, bias, residual):
        return expanded_matmul(
            *float_operands(x, w.prepare(gated=gated, float_terms=kind, for_floats=bits == 8), bias),
            jnp.float32,
            tiling=dataclasses.replace(SMALL, **changes),
            residual=residual,
            activation=Activation("silu", gated=True) if gated else None,
            blocks=2,
            interpret=RACES,
        )

    found = product(x, w, bias, residual)
    assert not races_found()
    wide, numbers = x.astype(np.float64), np.asarray(jax.jit(type(w).dequantize)(w), np.float64)
    expected, bound = wide @ numbers + bias, 2.0**-20 * (np.abs(wide) @ np.abs(numbers) + np.abs(bias))
    if kind is not None:  # a weight is rounded by half a unit in the last place of its column's largest
        bound += 2.0**-8 * np.abs(wide).sum(1)[:, None] * np.abs(numbers).max(0)
    if gated:
        (gate, value), (gate_bound, value_bound) = (np.split(each, 2, axis=1) for each in (expected, bound))
        expected = gate / (1 + np.exp(-gate)) * value
        bound = 1.1 * gate_bound * np.abs(value) + np.abs(gate) * value_bound + 1e-6 * np.abs(expected)
    else:
        expected = expected + residual
    assert np.all(np.abs(found - expected) <= bound + 2.0**-22 * np.abs(expected))


@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "a_bits"),
    [(4, 32, "zeros", 8), (3, 16, "offsets", 1), (4, 32, "block_minimums", 5)],
)
@pytest.mark.sample(1)
def test_products_of_quantized_tokens_round_weights_alone(bits, group_size, kind, a_bits):
    a_format, rng = BipolarFormat(a_bits), np.random.default_rng(0)
    m, n, k = 66, 140, 256 if kind.startswith("block") else 200
    w, x = weights_of(bits, n, k, group_size, kind), random_codes(a_format, m, k, 0)
    zero = rng.integers(0, a_format.max_value + 1, m) if a_bits > 1 else np.zeros(m, int)
    scale = rng.random(m, np.float32)

    @jax.jit
    def product(x, scale, zero, w):
        tokens = PackedTokens(code_words(x, a_format, "int8"), scale, zero, None)
        operands = step_operands(tokens, w.prepare(float_terms=kind, for_floats=a_bits == 8), a_format, None)
        return expanded_matmul(*operands, jnp.float32, tiling=SMALL, blocks=2, interpret=RACES)

    found = product(x, scale, zero.astype(np.int32), w)
    assert not races_found()
    steps = 2 * scale[:, None] * (x - zero[:, None] if a_bits > 1 else x - 0.5)
    numbers = numbers_of(w.with_scales())
    if numbers.shape[0] != n:
        numbers = numbers.T
    largest = np.abs(numbers).max(1)
    # A weight is rounded by half a unit in the last place of a number below twice the largest power of two.
    bound = 2.0**-10 * np.abs(steps).sum(1)[:, None] * largest
    assert np.all(np.abs(found - steps @ numbers.T) <= bound)


def test_quantized_tokens_become_their_steps():
    """In the order of pairs, with zeros beyond K; either order of positions."""
    for group_size, bits in ((32, 8), (16, 1)):
        a_format, (m, k) = BipolarFormat(bits), (3, 72)
        w, x = float_groups(BipolarFormat(2), 4, k, group_size, "scales"), random_codes(a_format, m, k, 0)
        zero = np.array([0, 7, 200], np.int32)

        @jax.jit
        def steps_of(x, zero, w, a_format=a_format):
            w = w.prepare(float_terms="scales")
            return token_steps(PackedTokens(code_words(x, a_format, "int8"), None, zero, None), a_format, w)

        found = steps_of(x, zero, w)
        steps = x - zero[:, None] if bits > 1 else 2 * x.astype(int) - 1
        assert found.dtype == jnp.float16
        numbers = np.asarray(found)[0]
        if group_size == 32:  # in the order of bytes
            halves = numbers.reshape(m, -1, 2, 2, 4, 2)  # step, half, pair, lane, number
            positions = np.moveaxis(halves, 3, 5).reshape(m, -1, 32)
            numbers = positions.reshape(m, -1, 8, 4).swapaxes(-1, -2).reshape(m, -1)
        np.testing.assert_array_equal(numbers, np.pad(steps, ((0, 0), (0, 128 - k))))


@pytest.mark.parametrize(("kind", "gated"), [("zeros", True), ("block_scales", False), ("offsets", True)])
@pytest.mark.sample(2)
def test_powers_of_two_leave_the_numbers(kind, gated):
    k = 256 if kind.startswith("block") else 200

    @jax.jit
    def numbers(w):
        w = w.prepare(gated=gated, float_terms=kind)
        below = below_powers_of_two(w)
        sums = below.scale * below.number_sums, w.scale * w.number_sums
        return below.dequantize(), w.dequantize(), *sums, jnp.abs(below.values()).max(-2)

    found, expected, sums, expected_sums, largest = numbers(float_groups(BipolarFormat(3), 140, k, 16, kind))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(sums, expected_sums)
    assert np.all((largest < 2) & (largest > 0))


def rows_of_float_fragments(registers: list[np.ndarray], dtype) -> np.ndarray:
    """Numbers [128, 16] by the PTX ISA's figure of A for m64nNk16, two blocks of 64 rows."""
    out, thread = np.zeros((128, 16)), np.arange(128)
    row, k = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
    for number, register in enumerate(registers):
        block, high_k, low_row = number // 4, number % 4 // 2, number % 2
        for i in range(2):
            out[64 * block + row + 8 * low_row, 8 * high_k + k + i] = register[:, None].view(dtype)[:, i]
    return out


@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "name"),
    [
        (4, 128, None, "bf16"),
        (3, 16, None, "f16"),
        (8, None, None, "bf16"),
        (1, 32, None, "f16"),
        (4, 32, "offsets", "f16"),
        (4, 64, "zeros", "bf16"),
        (8, 16, "zeros", "f16"),
        (1, 64, "scales", "f16"),
    ],
)
@pytest.mark.sample(3)
def test_threads_make_the_fragments(bits, group_size, kind, name, monkeypatch):
    float_type, expansion = FLOATS[name], FloatExpansion if kind is None else ScaledFloatExpansion
    chunks = 0 if group_size is None else 128 // group_size
    multiplication = FloatMultiplication(expansion(BipolarFormat(bits), chunks, float_type))

    @jax.jit
    def of_tile(w):
        w = w.prepare() if kind is None else below_powers_of_two(w.prepare(float_terms=kind))
        words, terms = (None if array is None else array[0, :, 0] for array in (w.words, w.terms))
        return words, terms, multiplication.expansion.of_tile(words, terms)

    words, terms, expected = of_tile(weights_of(bits, 128, 128, group_size, kind))
    # Of every instruction: pair, lane, number.
    expected = np.asarray(expected).reshape(128, -1, 4, 2, 2)
    expected = np.moveaxis(expected, 4, 2).reshape(128, 8, 16)
    words, terms = (None if a is None else np.array(a).reshape(-1, 4) for a in (words, terms))
    warpgroup_simulator.install(monkeypatch)
    before = warpgroup_simulator.bank_conflicts[0]
    thread = ptx.thread_in_warpgroup()
    lane, warp = ptx.bits_of(thread, 31), ptx.shift_right(thread, 5)

    def part(array):
        if array is None:
            return None
        return ptx.advance(ptx.pointer(array, ptx.SHARED), ptx.times(warp, array.nbytes // 4))

    for half in range(2):
        fragments = multiplication.fragments(part(words), part(terms), lane, half)
        for index, registers in enumerate(fragments, 4 * half):
            found = rows_of_float_fragments(registers, float_type.dtype)
            np.testing.assert_array_equal(found, expected[:, index])
    assert warpgroup_simulator.bank_conflicts[0] == before


def compiled(bits, group_size, name, tiling, *, kind=None, residual=False, gated=False, dtype=jnp.bfloat16):
    (m, n, k), w_format, aval = (1001, 4096, 4096), BipolarFormat(bits), jax.ShapeDtypeStruct
    tiles, stages, chunks = n // 128, k // 128, 0 if group_size is None else int(128 // np.gcd(group_size, 128))
    words = aval((tiles, PARTS, stages, bits, WORDS_PER_VECTOR), jnp.uint32)
    terms = aval((tiles, PARTS, stages, *terms_shape(kind, chunks)), jnp.uint32) if chunks else None
    scale, sums = (aval((n, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    number_sums = None if kind is None else scale
    weights = PreparedArray(words, terms, scale, sums, w_format, k, -2, group_size, gated, None, number_sums, kind)
    recovery = ExpandedFloatRecovery(name, k, w_format, terms is not None)

    def multiply(x, weights, tokens, columns, residual):
        activation = Activation("silu", gated=True) if gated else None
        options = dict(tiling=tiling, residual=residual, activation=activation)
        return expanded_matmul(x, weights, tokens, columns, recovery, dtype, **options)

    return sm90_compile.compile_for_h200(
        multiply,
        aval((1, m, k), FLOATS[name].dtype),
        weights,
        TokenTerms(None, None, None if kind is None else aval((m,), jnp.float32)),
        ColumnTerms(scale=aval((n,), jnp.float32), bias=aval((n,), jnp.float32)),
        aval((m, n), dtype) if residual else None,
        ptx=True,
    )[1]


@needs_compiler
@pytest.mark.parametrize(
    ("bits", "group_size", "name", "tiling", "options"),
    [
        (4, 128, "bf16", LARGE, dict(residual=True)),
        (4, 32, "f16", dataclasses.replace(LARGE, slots=3), dict(kind="offsets", gated=True)),
        (4, 128, "bf16", dataclasses.replace(LARGE, slots=3), dict(kind="offsets", residual=True)),
        (8, 16, "f16", dataclasses.replace(LARGE, slots=2), dict(kind="offsets", residual=True)),
        (3, 16, "bf16", Tiling(128, 128, "alternate", slots=4), dict(gated=True)),
        (1, 128, "f16", Tiling(88, 128, "split_n", slots=5), dict(residual=True)),
        (1, 128, "f16", Tiling(64, 128, "split_n", slots=6), dict(dtype=jnp.float32)),
        (8, None, "bf16", dataclasses.replace(LARGE, slots=2, splits=2), dict(dtype=jnp.float32)),
        (5, 64, "f16", Tiling(64, 128, "alternate", slots=6), {}),
    ],
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, name, tiling, options):
    report = compiled(bits, group_size, name, tiling, **options)
    assert report.registers == (168,)  # of a block of three warpgroups; consumers then take 232
    assert report.spill_bytes == report.stack_bytes == 0
    assert not report.serialized_wgmma
    assert f"k16.f32.{name}.{name}" in report.text
