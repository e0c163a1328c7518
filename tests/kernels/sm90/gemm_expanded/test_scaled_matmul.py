"""The product of prompts whose groups have float scales: interpreted, simulated, compiled; within its bound."""

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
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_expanded import scaled_multiply
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import product_operands, tokens_product
from bipolar_jax.kernels.sm90.gemm_expanded.launch import SummedTokens, expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ScaledRecovery
from bipolar_jax.kernels.sm90.gemm_expanded.scaled_arrays import unsigned_words
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import PARTS, WORDS_PER_VECTOR
from bipolar_jax.packing.float_terms import terms_shape
from tests.kernels.sm90.prepared_weights.test_expansion import rows_of_fragments
from tests.packing.float_groups import float_groups, numbers_of
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
A8 = BipolarFormat(8)
SMALL = Tiling(64, 128, "split_n", slots=3, band=2)


def largest_partial_sums(codes: np.ndarray, w) -> np.ndarray:
    """sum_k t (S u + |q|), [m, n], in float64."""
    group = np.arange(w.contracted_size) // w.group_size
    scale = 2 * np.asarray(w.scale, np.float64)[:, group]
    u = np.asarray(w.codes(), np.float64)
    return codes.astype(np.float64) @ (scale * u + np.abs(numbers_of(w) - scale * u)).T


@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "a_bits", "gated", "changes"),
    [
        # Three stages, of which a loop takes two; several tiles a block.
        (4, 128, "offsets", 8, False, dict(cluster_m=2)),
        (3, 96, "zeros", 5, True, dict(schedule="alternate")),
        (8, 64, "scales", 1, False, dict(cluster_n=2)),
        (4, 128, "zeros", 8, False, dict(tile_m=128)),
    ],
    ids=["W4g128f, residual", "W3g96f, gated", "W8g64f, one-bit tokens", "W4g128f, 128 tokens"],
)
@pytest.mark.sample(1)
def test_products_are_within_their_bound(bits, group_size, kind, a_bits, gated, changes):
    (m, n, k), rng, a_format = (70, 152, 300), np.random.default_rng(0), BipolarFormat(a_bits)
    w, x = float_groups(BipolarFormat(bits), n, k, group_size, kind), random_codes(a_format, m, k, 0)
    zero = rng.integers(0, a_format.max_value + 1, m) if a_bits > 1 else np.zeros(m, int)
    scale, bias = rng.random(m, np.float32) / 2**14, rng.normal(size=n).astype(np.float32)
    residual = None if gated else jnp.asarray(rng.normal(size=(m, n)), jnp.float32)
    tokens = PackedTokens(
        code_words(jnp.asarray(x), a_format, "int8"), scale, zero.astype(np.int32), x.sum(1, dtype=np.int32)
    )
    found = tokens_product(
        tokens,
        w.prepare(gated=gated, float_terms=kind),
        a_format,
        jnp.asarray(bias),
        jnp.float32,
        residual=residual,
        activation=Activation("silu", gated=True) if gated else None,
        tiling=dataclasses.replace(SMALL, **changes),
        blocks=2,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert not races_found()
    numbers = numbers_of(w)
    steps = x - zero[:, None] if a_bits > 1 else x - 0.5  # half of the values, as scales are doubled
    expected = 2 * scale[:, None] * (steps @ numbers.T) + bias
    chunks = -(-k // np.gcd(group_size, 128))
    magnitude = largest_partial_sums(x, w) + a_format.max_value * np.abs(numbers).sum(1)
    bound = (2 * chunks + 8) * 2.0**-24 * (2 * scale[:, None] * magnitude + np.abs(expected) + np.abs(bias))
    if gated:
        gate, value = np.split(expected, 2, axis=1)
        sigmoid = 1 / (1 + np.exp(-gate))
        expected, (gate_bound, value_bound) = gate * sigmoid * value, np.split(bound, 2, axis=1)
        bound = 1.1 * gate_bound * np.abs(value) + np.abs(gate) * value_bound + 1e-6 * np.abs(expected)
    else:
        expected = expected + np.asarray(residual, np.float64)
        bound = bound + 2.0**-23 * np.abs(expected)
    assert np.all(np.abs(found - expected) <= bound)


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "m"),
    [("scales", 8, 128, 64), ("zeros", 5, 32, 64), ("offsets", 4, 128, 128), ("offsets", 3, 64, 64)],
)
def test_threads_scale_units(kind, bits, group_size, m, monkeypatch):
    """One warpgroup over two stages, the first of the largest codes: words are read as floats without a conversion."""
    k, fmt = 256, BipolarFormat(bits)
    w, x = float_groups(fmt, 128, k, group_size, kind), random_codes(A8, m, k, 0)
    x[:, :128] = 255
    prepared = w.prepare(float_terms=kind)
    scaling = scaled_multiply.ChunkScaling(fmt, kind, prepared.chunks)
    words = np.array(unsigned_words(code_words(jnp.asarray(x), A8, "int8"), A8)).view(np.uint8)[0]
    chunk_sums = x.reshape(m, -1, 128 // prepared.chunks).sum(2).T.astype(np.float32)
    sums = np.array(scaled_multiply.in_order_of_lanes(chunk_sums))
    weights, terms = (np.array(array)[0].swapaxes(0, 1) for array in (prepared.words, prepared.terms))
    warpgroup_simulator.install(monkeypatch)
    thread = np.arange(128)

    def start_unsigned(fragments, tile, first_step, n, *, add_to=None, replace=None):
        """By the figures of the PTX ISA: A, and D of 64 rows."""
        rows = np.concatenate([rows_of_fragments(step)[:64] for step in fragments], axis=1).astype(np.int64)
        columns = tile[:, 32 * first_step :][:, : rows.shape[1]].astype(np.int64)
        product = (rows @ columns.T).astype(np.int32).view(np.uint32)
        before = [0] * (n // 2) if add_to is None else add_to
        first_row, first_column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
        places = ((first_row + 8 * (i // 2 % 2), first_column + 8 * (i // 4) + i % 2) for i in range(n // 2))
        return [product[place] + sums for place, sums in zip(places, before, strict=True)]

    monkeypatch.setattr(scaled_multiply, "start_unsigned", start_unsigned)
    monkeypatch.setattr(scaled_multiply, "settled", lambda numbers, *, in_flight: numbers)
    monkeypatch.setattr(scaled_multiply, "pinned", lambda numbers: numbers)
    monkeypatch.setattr(scaled_multiply, "wait", lambda *, in_flight: None)
    monkeypatch.setattr(scaled_multiply, "hidden_zero", lambda tile: np.zeros(128, np.uint32))
    before = warpgroup_simulator.bank_conflicts[0]
    totals, unit = [[np.zeros(128, np.float32)] * (m // 2) for _ in range(2)], None
    for stage in range(2):
        own = [np.ascontiguousarray(array) for array in (weights[stage], terms[stage])]
        own.append(np.ascontiguousarray(sums[prepared.chunks * stage : prepared.chunks * (stage + 1)]))
        refs = [scaled_multiply.ptx.pointer(array, scaled_multiply.ptx.SHARED) for array in own]
        tile = words[:, 128 * stage : 128 * (stage + 1)]
        started = scaled_multiply.add_units(totals, tile, *refs, scaling, m, unit)
        unit = started, refs[1]
    scales, _ = scaling.load(unit[1], prepared.chunks - 1, 1)
    scaled_multiply.add_products(totals, 1, scales, unit[0], in_flight=0)
    assert warpgroup_simulator.bank_conflicts[0] == before
    found = np.zeros((128, m))
    for block, i in np.ndindex(2, m // 2):
        row = 64 * block + 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
        found[row, 2 * (thread % 4) + 8 * (i // 4) + i % 2] = totals[block][i]
    bound = (4 * prepared.chunks + 2) * 2.0**-24 * largest_partial_sums(x, w)
    found = scaled_multiply.SUM_UNIT * np.asarray(prepared.scale) * found
    assert np.all(np.abs(found.T - x @ numbers_of(w).T) <= bound)


@pytest.mark.parametrize(
    ("tiling", "chunks"),
    [
        (Tiling(128, 128, "split_n"), 2),
        (Tiling(128, 128, "alternate"), 1),
        (SMALL, 8),
        (dataclasses.replace(SMALL, splits=2), 1),
    ],
    ids=["128 tokens, groups of 64", "128 tokens a consumer", "groups of 16", "splits of K"],
)
def test_what_does_not_fit_is_refused(tiling, chunks):
    recovery = ScaledRecovery("int8", A8, BipolarFormat(4), 4096, True)
    problem = ExpandedProblem(64, 256, recovery, tiling, chunks=chunks, float_terms="scales")
    with pytest.raises(ValueError, match="tiles of 64 tokens, no splits of K and 1, 2 or 4 chunks a stage"):
        problem.check(itemsize=2)


def test_tokens_without_their_sums_are_refused():
    w = float_groups(BipolarFormat(4), 8, 256, 128, "scales").prepare()
    ones = np.ones(64, np.int32)
    tokens = PackedTokens(jnp.zeros((1, 64, 64), jnp.uint32), ones.astype(np.float32), ones, ones)
    operands = product_operands(tokens, w, A8, None)
    with pytest.raises(ValueError, match="is not of PreparedArray"):
        expanded_matmul(tokens.words, *operands[1:], jnp.float32)


def compiled(bits, group_size, kind, tiling, *, residual=False, gated=False, dtype=jnp.bfloat16):
    (m, n, k), w_format = (1001, 4096, 4096), BipolarFormat(bits)
    aval = jax.ShapeDtypeStruct
    tiles, stages, chunks = n // 128, k // 128, int(128 // np.gcd(group_size, 128))
    words = aval((tiles, PARTS, stages, bits, WORDS_PER_VECTOR), jnp.uint32)
    terms = aval((tiles, PARTS, stages, *terms_shape(kind, chunks)), jnp.uint32)
    scale, sums = (aval((n, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    weights = PreparedArray(words, terms, scale, sums, w_format, k, -2, group_size, gated, None, scale, kind)
    recovery = ScaledRecovery("int8", A8, w_format, k, with_zero=True)

    def multiply(x, weights, tokens, columns, residual):
        activation = Activation("silu", gated=True) if gated else None
        options = dict(tiling=tiling, residual=residual, activation=activation)
        return expanded_matmul(x, weights, tokens, columns, recovery, dtype, **options)

    column = aval((n,), jnp.float32)
    return sm90_compile.compile_for_h200(
        multiply,
        SummedTokens(aval((1, m, k // 4), jnp.uint32), aval((m, stages * chunks), jnp.float32)),
        weights,
        TokenTerms(None, aval((m,), jnp.int32), aval((m,), jnp.float32)),
        ColumnTerms(scale=column, scaled_value_sums=column, bias=column),
        aval((m, n), dtype) if residual else None,
        ptx=True,
    )[1]


@needs_compiler
@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "tiling", "options"),
    [
        (4, 128, "offsets", Tiling(64, 128, "split_n", slots=6), dict(residual=True)),
        (4, 256, "zeros", Tiling(128, 128, "split_n", slots=4), dict(gated=True)),
        (4, 128, "offsets", Tiling(128, 128, "split_n", slots=4), dict(residual=True)),
        (8, 128, "offsets", Tiling(64, 128, "split_n", slots=4), dict(residual=True, dtype=jnp.float32)),
        (4, 32, "offsets", Tiling(64, 128, "split_n", slots=5), dict(gated=True)),
        (5, 64, "zeros", Tiling(64, 128, "split_n", slots=5), dict(residual=True)),
        (3, 128, "scales", Tiling(64, 128, "alternate", slots=8), {}),
    ],
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, kind, tiling, options):
    report = compiled(bits, group_size, kind, tiling, **options)
    assert report.registers == (168,)  # of a block of three warpgroups; consumers then take 232
    assert report.spill_bytes == report.stack_bytes == 0
    assert not report.serialized_wgmma
    # Bytes are unsigned, and multiply-adds take subnormal numbers as they are.
    assert "k32.s32.u8.u8" in report.text
    assert "fma.rn.f32" in report.text
    assert "fma.rn.ftz" not in report.text
