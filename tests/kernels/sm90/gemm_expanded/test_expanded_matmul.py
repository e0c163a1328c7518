"""The product of prepared weights: exact in interpret mode with no races, and compiled without spills."""

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
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Output, Writer
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import integer_product, tokens_product
from bipolar_jax.kernels.sm90.gemm_expanded.launch import DEFAULT_TILING, expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.output import TransposedOutput, TransposedWriter
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.prepared_weights.token_order import words_in_order
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import CHUNK_WORDS, PARTS, WORDS_PER_VECTOR, positions_of
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
A8 = BipolarFormat(8)
SMALL = Tiling(64, 128, "split_n", slots=3, band=2)


@pytest.mark.parametrize(
    ("bits", "group_size", "changes", "lag"),
    [
        (4, 64, dict(cluster_m=2), 1),
        (3, 16, dict(tile_m=80, schedule="alternate", cluster_n=2, splits=2), 0),
        (8, None, dict(schedule="split_m", splits=4), 0),
        (2, 128, dict(tile_m=160, slots=2), 0),
    ],
    ids=[
        "clusters along m, with a lag",
        "80 tokens, clusters along n, K split",
        "codes, a split behind K",
        "160 tokens",
    ],
)
def test_integer_products_are_exact(bits, group_size, changes, lag):
    """Ragged in every direction, several tiles a block, more stages than slots."""
    w_format, (m, n, k) = BipolarFormat(bits), (150, 200, 680)
    x, ones = random_codes(A8, m, k, 0), np.ones(n, np.float32)
    if group_size is None:
        codes = random_codes(w_format, n, k, 1)
        w, values = array_of_codes(codes, w_format, ones), 2 * codes.astype(np.int64) - w_format.max_value
    else:
        groups = random_groups(w_format, n, k, group_size)
        w, values = array_of_groups(groups, w_format, ones), groups.values
    found = integer_product(
        jnp.asarray(x),
        w.prepare(),
        A8,
        tiling=dataclasses.replace(SMALL, **changes),
        lag=lag,
        blocks=2,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    np.testing.assert_array_equal(found[..., 0], (2 * x.astype(np.int64) - A8.max_value) @ values.T)
    assert not races_found()


@pytest.mark.parametrize("epilogue", ["residual", "gated"])
def test_scaled_products(epilogue):
    """Zero codes, scales, a bias; codes with offsets and a residual, or integer groups and a gated activation."""
    (m, n, k), rng = (70, 152, 96), np.random.default_rng(0)
    gated = epilogue == "gated"
    columns = 2 * n if gated else n
    x, zero_code = random_codes(A8, m, k, 0), rng.integers(0, 256, m)
    scale, column_scale, bias, offset = (rng.random(size, np.float32) for size in (m, columns, columns, columns))
    scale /= 2**18
    if gated:
        w_format = BipolarFormat(4)
        groups = random_groups(w_format, columns, k, 32)
        w, numbers = array_of_groups(groups, w_format, column_scale), column_scale[:, None] * groups.values
        options = {"activation": Activation("silu", gated=True), "tiling": SMALL}
    else:
        w_format = BipolarFormat(7)
        codes = random_codes(w_format, n, k, 1)
        w = dataclasses.replace(array_of_codes(codes, w_format, column_scale), offset=offset[:, None])
        numbers = column_scale[:, None] * (2.0 * codes - w_format.max_value) + offset[:, None]
        options = {"residual": jnp.asarray(rng.normal(size=(m, n)), jnp.bfloat16)}
        options["tiling"] = dataclasses.replace(SMALL, splits=2)
    expected = 2 * scale[:, None] * ((x.astype(int) - zero_code[:, None]) @ numbers.T) + bias
    if gated:
        gate, value = expected[:, :n], expected[:, n:]
        expected = gate / (1 + np.exp(-gate)) * value
    else:
        expected = expected + np.asarray(options["residual"], np.float64)
    code_sums = x.sum(1, dtype=np.int32)
    found = tokens_product(
        PackedTokens(code_words(jnp.asarray(x), A8, "int8"), scale, zero_code.astype(np.int32), code_sums),
        w.prepare(gated=gated),
        A8,
        bias,
        jnp.bfloat16,
        blocks=2,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        **options,
    )
    # Two roundings to bfloat16 with a residual, one without.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-7, atol=2**-6)
    assert not races_found()


@pytest.mark.parametrize("order", ["bytes", "floats"])
def test_bytes_lie_in_the_order_of_positions(order):
    codes = random_codes(A8, 3, 64, 0)
    words = words_in_order(code_words(jnp.asarray(codes), A8, "int8"), order)
    np.testing.assert_array_equal(np.asarray(words).view(np.int8)[0], positions_of(codes.astype(int) - 128, order))


def test_outputs_offer_what_the_protocol_says():
    assert isinstance(TransposedOutput(None, jnp.dtype(jnp.bfloat16)), Output)
    assert isinstance(TransposedWriter(*[None] * 6), Writer)


def test_what_does_not_belong_together_is_refused():
    fmt = BipolarFormat(4)
    codes = np.zeros((128, 128), np.uint8)
    weights = array_of_codes(codes, fmt, np.ones(128, np.float32)).prepare()
    words, ones = jnp.zeros((1, 64, 32), jnp.uint32), jnp.ones(64, jnp.int32)
    recovery = ExpandedRecovery("int8", A8, fmt, 128, False)
    tokens, columns = TokenTerms(ones, ones, None), ColumnTerms(code_sums=jnp.ones(128, jnp.int32))
    for change, message in (
        (dict(k=64), "is not of PreparedArray.* with 0 chunks"),
        (dict(grouped=True), "is not of PreparedArray.* with 0 chunks"),
    ):
        with pytest.raises(ValueError, match=message):
            expanded_matmul(words, weights, tokens, columns, dataclasses.replace(recovery, **change), jnp.int32)
    with pytest.raises(ValueError, match="sums over 70000 elements exceed int32: at most 33025"):
        longer, rows = (
            dataclasses.replace(recovery, w_format=A8, k=70000),
            dataclasses.replace(weights, contracted_size=70000),
        )
        expanded_matmul(words, rows, tokens, columns, longer, jnp.int32)
    with pytest.raises(ValueError, match="multiples of 16 bytes, got 30 numbers of uint32"):
        expanded_matmul(words[..., :30], weights, tokens, columns, recovery, jnp.int32)


def test_a_lag_that_the_ring_cannot_hold_is_refused():
    problem = ExpandedProblem(
        256, 256, ExpandedRecovery("int8", A8, A8, 1024, True), Tiling(128, 128, "split_n", slots=4), lag=4
    )
    with pytest.raises(ValueError, match="a lag of 4 stages needs more than 4 slots"):
        problem.check(itemsize=2)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(128, 64, "split_n"), "tile_n must be 128"),
        (Tiling(192, 128, "split_n"), "tile_m must be at most 160, a multiple of 16 .of 8 up to 32., got"),
        (Tiling(72, 128, "split_n"), "tile_m must be at most 160, a multiple of 16 .of 8 up to 32., got"),
        (Tiling(128, 128, "split_n", slots=8), "bytes of shared memory"),
        (Tiling(128, 128, "split_n", slots=1), "at least 2 slots"),
    ],
)
def test_tilings_that_do_not_fit_are_refused(tiling, message):
    recovery = ExpandedRecovery("int8", A8, BipolarFormat(4), 4096, True, grouped=True)
    with pytest.raises(ValueError, match=message):
        ExpandedProblem(2048, 4096, recovery, tiling, w_bits=4, chunks=1).check(itemsize=2)


def compiled(bits, group_size, tiling=DEFAULT_TILING, *, residual=False, gated=False, lag=0, dtype=jnp.bfloat16):
    (m, n, k), w_format = (1001, 4096, 4096), BipolarFormat(bits)
    vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)  # noqa: E731
    tiles, stages = n // 128, k // 128
    terms = None
    if group_size is not None:
        chunks = 128 // np.gcd(group_size, 128)
        terms = jax.ShapeDtypeStruct((tiles, PARTS, stages, chunks, CHUNK_WORDS), jnp.uint32)
    words = jax.ShapeDtypeStruct((tiles, PARTS, stages, bits, WORDS_PER_VECTOR), jnp.uint32)
    scale, sums = (jax.ShapeDtypeStruct((n, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    weights = PreparedArray(words, terms, scale, sums, w_format, k, -2, group_size, gated)
    activation = Activation("silu", gated=True) if gated else None
    recovery = ExpandedRecovery("int8", A8, w_format, k, True, terms is not None)

    def multiply(x, weights, tokens, columns, residual):
        options = dict(tiling=tiling, residual=residual, activation=activation, lag=lag)
        return expanded_matmul(x, weights, tokens, columns, recovery, dtype, **options)

    return sm90_compile.compile_for_h200(
        multiply,
        jax.ShapeDtypeStruct((1, m, k // 4), jnp.uint32),
        weights,
        TokenTerms(vector(m, jnp.int32), vector(m, jnp.int32), vector(m, jnp.float32)),
        ColumnTerms(code_sums=vector(n, jnp.int32), scale=vector(n, jnp.float32), bias=vector(n, jnp.float32)),
        jax.ShapeDtypeStruct((m, n), dtype) if residual else None,
        ptx=True,
    )


@needs_compiler
@pytest.mark.parametrize(
    ("bits", "group_size", "options"),
    [
        (1, 128, dict(tiling=Tiling(64, 128, "split_n", slots=6))),
        (3, 128, dict(residual=True)),
        (4, 128, dict(tiling=Tiling(112, 128, "alternate", slots=6), residual=True)),
        (4, 32, dict(tiling=Tiling(160, 128, "split_n", slots=4), gated=True)),
        (4, 32, dict(gated=True, lag=2)),
        (5, 16, dict(tiling=Tiling(128, 128, "alternate", slots=4))),
        (6, 64, dict(tiling=Tiling(128, 128, "split_n", slots=4), residual=True, dtype=jnp.float32)),
        (8, None, dict(tiling=Tiling(128, 128, "split_n", slots=4, cluster_m=2, cluster_n=2))),
        (4, 128, dict(tiling=Tiling(128, 128, "split_n", slots=4, splits=3), dtype=jnp.float32)),
    ],
    ids=[
        "W1",
        "W3, residual",
        "W4, 112 tokens",
        "W4, 160 tokens, gated",
        "W4, gated, lag",
        "W5, alternating",
        "W6, float32",
        "W8, clusters",
        "W4, splits",
    ],
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, options):
    program, report = compiled(bits, group_size, **options)
    (*_, last) = (line for line in program.as_text().splitlines() if "ROOT" in line)
    is_split = options.get("tiling", DEFAULT_TILING).splits > 1
    assert ("custom-call" in last) != is_split  # a pass of XLA follows splits of K alone
    assert len(report.registers) == 1
    assert report.registers[0] <= 168  # of a block of three warpgroups; consumers then take 232
    assert report.spill_bytes == report.stack_bytes == 0
    assert not report.serialized_wgmma
    assert "k32.s32.u8.s8" in report.text
    # 16-bit numbers are transposed on their way to shared memory.
    assert ("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in report.text) == ("dtype" not in options)
