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
from bipolar_jax.kernels.sm90.gemm_expanded import layout
from bipolar_jax.kernels.sm90.gemm_expanded.launch import DEFAULT_TILING, expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.layout import PreparedWeights
from bipolar_jax.kernels.sm90.gemm_expanded.output import TransposedOutput, TransposedWriter
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from tests.kernels.sm90.gemm_expanded.integer_groups import packed_planes, random_groups
from tests.support import sm90_compile
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
A8 = BipolarFormat(8)
SMALL = Tiling(64, 128, "split_n", slots=3, band=2)


def prepared(codes, fmt, groups=None, **options) -> PreparedWeights:
    planes = packed_planes(codes, fmt)
    if groups is not None:
        options |= dict(group_size=groups.group_size, group_scale=groups.scale, group_offset=groups.offset)
    return layout.prepare(planes, fmt, codes.shape[1], **options)


def token_words(x, a_format, weights):
    words = code_words(jnp.asarray(x), a_format, "int8")
    return layout.in_natural_order(words) if weights.natural_order else words


def product(x, a_format, weights, w_format, column_sums, dtype=jnp.int32, *, tokens=None, columns=None, **options):
    """The kernel with `SMALL` tiles; int32 unless it is told of scales."""
    code_sums = jnp.asarray(x).sum(axis=1, dtype=jnp.int32)
    tokens = TokenTerms(code_sums, jnp.zeros_like(code_sums), None) if tokens is None else tokens
    columns = ColumnTerms() if columns is None else columns
    return expanded_matmul(
        token_words(x, a_format, weights),
        weights,
        tokens,
        dataclasses.replace(columns, code_sums=jnp.asarray(column_sums, jnp.int32)),
        ExpandedRecovery("int8", a_format, w_format, x.shape[1], tokens.scale is not None, weights.terms is not None),
        dtype,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        **{"tiling": SMALL, "blocks": 2} | options,
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "changes", "lag"),
    [
        (4, 64, dict(cluster_m=2), 1),
        (3, 16, dict(schedule="alternate", cluster_n=2), 0),
        (8, None, dict(schedule="split_m"), 0),
    ],
    ids=["clusters along m, with a lag", "clusters along n, alternating", "codes"],
)
def test_integer_products_are_exact(bits, group_size, changes, lag):
    """Ragged in every direction, several tiles a block, an odd number of stages beside whole iterations."""
    w_format, (m, n, k) = BipolarFormat(bits), (150, 200, 680)
    x = random_codes(A8, m, k, 0)
    if group_size is None:
        codes = random_codes(w_format, n, k, 1)
        weights, values = prepared(codes, w_format), 2 * codes.astype(np.int64) - w_format.max_value
        column_sums = codes.sum(1, dtype=np.int64)
    else:
        groups = random_groups(w_format, n, k, group_size)
        weights, values = prepared(groups.codes, w_format, groups), groups.values
        column_sums = values.sum(1)
    tiling = dataclasses.replace(SMALL, **changes)
    found = product(x, A8, weights, w_format, column_sums, tiling=tiling, lag=lag)
    np.testing.assert_array_equal(found, (2 * x.astype(np.int64) - A8.max_value) @ values.T)
    assert not races_found()


@pytest.mark.parametrize("epilogue", ["residual", "gated"])
def test_scaled_products(epilogue):
    """Scales, zero codes, a bias, and a residual or a gated activation; bfloat16 through staging slots."""
    w_format, (m, n, k), rng = BipolarFormat(4), (70, 152, 96), np.random.default_rng(0)
    gated = epilogue == "gated"
    x, groups = random_codes(A8, m, k, 0), random_groups(w_format, 2 * n if gated else n, k, 32)
    zero_code, scale = rng.integers(0, 256, m), rng.random(m, np.float32) / 2**18
    column_scale, bias = (rng.random(len(groups.codes), np.float32) for _ in range(2))
    expected = 2 * scale[:, None] * column_scale * ((x.astype(int) - zero_code[:, None]) @ groups.values.T) + bias
    options = {}
    if gated:
        options["activation"] = Activation("silu", gated=True)
        gate, value = expected[:, :n], expected[:, n:]
        expected = gate / (1 + np.exp(-gate)) * value
    else:
        options["residual"] = jnp.asarray(rng.normal(size=(m, n)), jnp.bfloat16)
        expected = expected + np.asarray(options["residual"], np.float64)
    found = product(
        x,
        A8,
        prepared(groups.codes, w_format, groups, gated=gated),
        w_format,
        groups.values.sum(1),
        jnp.bfloat16,
        tokens=TokenTerms(
            jnp.asarray(x).sum(axis=1, dtype=jnp.int32), jnp.asarray(zero_code, jnp.int32), jnp.asarray(scale)
        ),
        columns=ColumnTerms(scale=jnp.asarray(column_scale), bias=jnp.asarray(bias)),
        **options,
    )
    # Two roundings to bfloat16 with a residual, one without.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-7, atol=2**-6)
    assert not races_found()


def test_outputs_offer_what_the_protocol_says():
    assert isinstance(TransposedOutput(None, jnp.dtype(jnp.bfloat16)), Output)
    assert isinstance(TransposedWriter(*[None] * 6), Writer)


def test_what_does_not_belong_together_is_refused():
    fmt = BipolarFormat(4)
    weights = prepared(np.zeros((128, 128), np.uint8), fmt)
    words, ones = jnp.zeros((1, 64, 32), jnp.uint32), jnp.ones(64, jnp.int32)
    recovery = ExpandedRecovery("int8", A8, fmt, 128, False)
    tokens, columns = TokenTerms(ones, ones, None), ColumnTerms(code_sums=jnp.ones(128, jnp.int32))
    for change, message in (
        (dict(k=64), "is not of weights with k=128 and 0 chunks"),
        (dict(grouped=True), "is not of weights with k=128 and 0 chunks"),
    ):
        with pytest.raises(ValueError, match=message):
            expanded_matmul(words, weights, tokens, columns, dataclasses.replace(recovery, **change), jnp.int32)
    with pytest.raises(ValueError, match="sums over 70000 elements exceed int32: at most 65793"):
        longer, rows = dataclasses.replace(recovery, k=70000), dataclasses.replace(weights, k=70000)
        expanded_matmul(words, rows, tokens, columns, longer, jnp.int32)
    with pytest.raises(ValueError, match="multiples of 4 words, got 30"):
        expanded_matmul(words[..., :30], weights, tokens, columns, recovery, jnp.int32)


def test_a_lag_that_the_ring_cannot_hold_is_refused():
    problem = ExpandedProblem(
        256, 256, ExpandedRecovery("int8", A8, A8, 1024, True), Tiling(128, 128, "split_n", slots=4), lag=2
    )
    with pytest.raises(ValueError, match="a lag of 2 x 2 stages needs more than 4 slots"):
        problem.check(itemsize=2)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(128, 64, "split_n"), "tile_n must be 128"),
        (Tiling(192, 128, "split_n"), "tile_m must be 64 or 128"),
        (Tiling(128, 128, "split_n", slots=8), "bytes of shared memory"),
        (Tiling(128, 128, "split_n", slots=1), "at least 2 slots"),
    ],
)
def test_tilings_that_do_not_fit_are_refused(tiling, message):
    recovery = ExpandedRecovery("int8", A8, BipolarFormat(4), 4096, True, grouped=True)
    with pytest.raises(ValueError, match=message):
        ExpandedProblem(2048, 4096, recovery, tiling, w_bits=4, chunks=1).check(itemsize=2)


def compiled(bits, group_size, tiling=DEFAULT_TILING, *, residual=False, gated=False, unrolled=2, lag=0, k=4096):
    m, n, w_format = 2048, 4096, BipolarFormat(bits)
    vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)  # noqa: E731
    tiles, stages = n // 128, k // 128
    terms = None
    if group_size is not None:
        chunks = 128 // np.gcd(group_size, 128)
        terms = jax.ShapeDtypeStruct((tiles, stages, chunks, layout.CHUNK_WORDS), jnp.uint32)
    words = jax.ShapeDtypeStruct((tiles, stages, bits, layout.WORDS_PER_VECTOR), jnp.uint32)
    weights = PreparedWeights(words, terms, n, k, natural_order=False)
    activation = Activation("silu", gated=True) if gated else None
    recovery = ExpandedRecovery("int8", A8, w_format, k, True, terms is not None)

    def multiply(x, weights, tokens, columns, residual):
        options = dict(tiling=tiling, residual=residual, activation=activation, stages_per_iteration=unrolled, lag=lag)
        return expanded_matmul(x, weights, tokens, columns, recovery, jnp.bfloat16, **options)

    return sm90_compile.compile_for_h200(
        multiply,
        jax.ShapeDtypeStruct((1, m, k // 4), jnp.uint32),
        weights,
        TokenTerms(vector(m, jnp.int32), vector(m, jnp.int32), vector(m, jnp.float32)),
        ColumnTerms(code_sums=vector(n, jnp.int32), scale=vector(n, jnp.float32), bias=vector(n, jnp.float32)),
        jax.ShapeDtypeStruct((m, n), jnp.bfloat16) if residual else None,
        ptx=True,
    )[1]


@needs_compiler
@pytest.mark.parametrize(
    ("bits", "group_size", "options"),
    [
        *[(bits, size, {}) for bits, size in ((1, 128), (3, 128), (4, 32), (6, 64), (8, None))],
        (5, 16, dict(tiling=Tiling(128, 128, "alternate", slots=4))),
        (4, 128, dict(residual=True)),
        (4, 128, dict(gated=True, lag=2)),
        (4, 128, dict(tiling=Tiling(64, 128, "split_n", slots=6))),
    ],
    ids=str,
)
def test_it_compiles_without_spills(bits, group_size, options):
    if bits > 5:
        options = {"tiling": dataclasses.replace(DEFAULT_TILING, slots=4)} | options
    report = compiled(bits, group_size, **options)
    assert len(report.registers) == 1
    assert report.registers[0] <= 168  # of a block of three warpgroups; consumers then take 232
    assert report.spill_bytes == report.stack_bytes == 0
    assert not report.serialized_wgmma
    assert "k32.s32.u8.s8" in report.text
    # 16-bit numbers are transposed on their way to shared memory.
    assert "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in report.text
