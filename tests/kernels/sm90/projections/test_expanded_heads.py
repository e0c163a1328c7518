"""Heads of prompts by the product of prepared weights: bit for bit those of bytes, no races, no spills."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import RMSNorm
from bipolar_jax.kernels.semantics.rotation import fixed_point_tables
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words, expand_planes
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.expanded_planning import ONE_CHUNK_CANDIDATES, SCALED_CANDIDATES
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Output, Writer
from bipolar_jax.kernels.sm90.gemm_expanded import head_norms
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import product_operands
from bipolar_jax.kernels.sm90.gemm_expanded.heads import ExchangedHeadWriter, TransposedHeadOutput, TransposedHeadWriter
from bipolar_jax.kernels.sm90.gemm_expanded.launch import SummedTokens
from bipolar_jax.kernels.sm90.gemm_expanded.problem import ExpandedProblem
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedFloatRecovery, ExpandedRecovery, ScaledRecovery
from bipolar_jax.kernels.sm90.projections.prompt_projection import (
    EXPANDED_TILINGS,
    plan_expanded_heads,
    plan_prompt_heads,
    project_expanded_heads,
    project_heads,
)
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import PARTS, WORDS_PER_VECTOR
from bipolar_jax.packing.float_terms import terms_shape
from tests.gpu.cases.heads import Prompts
from tests.gpu.trial import Case as Trial
from tests.gpu.trial import run_cases
from tests.packing.float_groups import float_groups
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
A8, W4 = BipolarFormat(8), BipolarFormat(4)
LAYERS, LAYER = 2, 1
RACES = plgpu.InterpretGPUParams(detect_races=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """Prompts whose heads both products make."""

    layout: HeadLayout
    batch: int
    length: int
    tiling: Tiling
    dtype: type = jnp.bfloat16
    rope: bool = True
    offsets: bool = False
    k: int = 70


CASES = {
    "heads of 128, sequences": Case(HeadLayout(2, 1, 128, 131), 2, 67, Tiling(128, 128, "split_n", slots=2)),
    "heads of 64, two chunks of tokens": Case(
        HeadLayout(3, 1, 64, 330), 1, 130, Tiling(128, 128, "alternate", slots=2), dtype=jnp.float16, offsets=True
    ),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_heads_are_those_of_bytes(case):
    """Weights of one scale a column: both products finish the same integers by the same float operations.

    XLA on a CPU may contract a multiplication and an addition in one of the two programs alone.
    """
    rng, layout = np.random.default_rng(0), case.layout
    m, n, half = case.batch * case.length, layout.columns, layout.half
    x, codes = random_codes(A8, m, case.k, 0), random_codes(W4, n, case.k, 1)
    scale, column_scale, bias, offset = (rng.random(size, np.float32) for size in (m, n, n, n))
    tokens = PackedTokens(
        code_words(jnp.asarray(x), A8, "int8"), scale, rng.integers(0, 256, m, np.int32), x.sum(1, dtype=np.int32)
    )
    w = array_of_codes(codes, W4, column_scale)
    w = dataclasses.replace(w, offset=offset[:, None] if case.offsets else None)
    angles = jnp.asarray(rng.standard_normal((1, case.length, half)), jnp.float32)
    tables = fixed_point_tables((jnp.cos(angles), jnp.sin(angles)), 1) if case.rope else None
    shape = (LAYERS, case.batch, layout.keys, layout.capacity, layout.size)
    options = dict(length=case.length, interpret=RACES)

    def rest():
        keys, values = (jnp.full(shape, fill, case.dtype) for fill in (jnp.nan, 7))
        return layout, keys, values, jnp.int32(LAYER), tables

    operands = product_operands(tokens, w.prepare(), A8, bias)
    found = project_expanded_heads(*operands, case.tiling, *rest(), **options, blocks=2)
    assert not races_found()
    expected = project_heads(
        tokens.words,
        expand_planes(jnp.asarray(w.planes), W4),
        operands.tokens,
        operands.columns,
        Recovery("int8", A8, W4, case.k, with_zero=True),
        Tiling(64, 128, "alternate", slots=2),
        *rest(),
        **options,
    )
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        step, (got, wanted) = float(jnp.finfo(got.dtype).eps), (np.asarray(a, np.float32) for a in (got, wanted))
        np.testing.assert_allclose(got, wanted, rtol=step, atol=0)
        assert np.mean(got == wanted) + np.mean(np.isnan(got)) >= 0.999


@pytest.mark.covered("the kernel, by the tests beside it; the model, by `make gpu-test`")
def test_prompts_of_integer_groups_are_served():
    """Quantized, laid out, multiplied and cached; groups of 16, for which tokens are in the order of floats."""
    prompts = Prompts(3, 8, 2, 67, 1, 1, 128, 70, rope=False, bias=True, group_size=16, k=70)
    (outcome,) = run_cases([Trial("heads", prompts.trial)], 1, around=lambda name: interpreted(RACES))
    assert outcome.error is None
    assert not races_found()


@pytest.mark.covered("threads, below; the kernel, by `make gpu-test`")
@pytest.mark.parametrize("float_terms", [None, "offsets"])
def test_heads_of_prompts_are_normalized(float_terms):
    """Queries and keys by gains of their own, of two sequences that end within a tile; values are not.

    Of small negative cosines the bits are those of bfloat16's signaling NaNs, which XLA on a CPU makes quiet.
    """
    groups = dict(group_size=64, prepared=True, float_terms=float_terms, head_norms=True, angles=(0.1, 1.4))
    prompts = Prompts(4, 8, 2, 67, 2, 1, 128, 70, bias=True, k=70, **groups)
    (outcome,) = run_cases([Trial("heads", prompts.trial)], 1, around=lambda name: interpreted(RACES))
    assert outcome.error is None
    assert not races_found()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_threads_normalize_heads(dtype, monkeypatch):
    """Numbers as they lie in the fragments of an accumulator: number 4 j + 2 p + i of a thread."""
    warpgroup_simulator.install(monkeypatch)
    rng = np.random.default_rng(0)
    head = rng.standard_normal((128, 64)).astype(np.float32) * rng.uniform(0.1, 10, 64).astype(np.float32)
    gains = [np.asarray(rng.uniform(0.5, 1.5, 128), dtype) for _ in range(2)]
    warp, lane = np.divmod(np.arange(128), 32)
    places = [
        (16 * warp + 8 * p + lane // 4, 8 * j + 2 * (lane % 4) + i)
        for j in range(8)
        for p in range(2)
        for i in range(2)
    ]
    numbers = [[head[64 * half + row, column] for row, column in places] for half in range(2)]
    pointers = [ptx.pointer(gain, ptx.GLOBAL) for gain in gains]
    sums = ptx.pointer(np.zeros(head_norms.SUMS_SHAPE, np.float32), ptx.SHARED)
    takes_key = np.ones(128, bool)
    found = head_norms.normalized_numbers(numbers, pointers, gains[0].itemsize, takes_key, 1e-3, sums)
    expected = head / np.sqrt(np.mean(head.astype(np.float64) ** 2, axis=0) + 1e-3) * gains[1].astype(float)[:, None]
    for half in range(2):
        for got, (row, column) in zip(found[half], places, strict=True):
            np.testing.assert_allclose(got, expected[64 * half + row, column], rtol=1e-5)


def avals(w, *, size=128, length=1000, dtype=jnp.bfloat16, norms=False):
    """Operands of `prompt_heads` for two prompts and one head of keys."""
    cache = jax.ShapeDtypeStruct((1, 2, 1, 1000, size), dtype)
    x = jax.ShapeDtypeStruct((2, length, w.contracted_size), dtype)
    norm = RMSNorm(jnp.ones(size), 1e-6)
    return x, w, A8, None, None, cache, cache, jnp.int32(0), *((None, (norm, norm)) if norms else ())


def weights(bits=4, group_size=128, n=512, k=256):
    fmt = BipolarFormat(bits)
    if group_size is None:
        return array_of_codes(random_codes(fmt, n, k, 0), fmt, np.ones(n, np.float32))
    return array_of_groups(random_groups(fmt, n, k, group_size), fmt, np.ones(n, np.float32))


@pytest.mark.covered("the kernel, by the tests beside it; the model, by `make gpu-test`")
@pytest.mark.parametrize("group_size", [128, 32])
@pytest.mark.sample(1)
def test_prompts_of_float_groups_are_served(group_size):
    """Several sequences, whose tokens' sums begin rows of their own; short groups become float16."""
    groups = dict(group_size=group_size, prepared=True, float_terms="offsets", k=300)
    prompts = Prompts(4, 8, 2, 67, 1, 1, 64, 70, rope=False, bias=True, **groups)
    (outcome,) = run_cases([Trial("heads", prompts.trial)], 1, around=lambda name: interpreted(RACES))
    assert outcome.error is None
    assert not races_found()


def test_plans_of_float_groups():
    with interpreted(RACES):
        plan = plan_prompt_heads(*avals(float_groups(BipolarFormat(4), 512, 256, 128, "zeros").prepare()))
        assert plan.kernel == (
            "int8 tensor cores, weights of 4 bits in float groups of 128 expanded in registers, "
            "heads written to the cache"
        )
        assert plan.tiling.tile_m == 64
        short = plan_prompt_heads(*avals(float_groups(BipolarFormat(4), 512, 256, 32, "zeros").prepare()))
        assert short.kernel == (
            "float16 tensor cores, weights of 4 bits in float groups of 32 expanded to float16 in registers, "
            "heads written to the cache"
        )


def test_plans_leave_room_for_heads():
    with interpreted(RACES):
        packed, prepared = (plan_prompt_heads(*avals(w)) for w in (weights(), weights().prepare()))
        assert packed.kernel == prepared.kernel
        assert prepared.kernel == (
            "int8 tensor cores, weights of 4 bits in integer groups of 128 expanded in registers, "
            "heads written to the cache"
        )
        assert "prepare_for_inference" in packed.reason
        assert prepared.reason == "estimated from tile sizes"
        many = HeadLayout(32, 8, 128, 2048)
        assert plan_expanded_heads(1, 2048, weights().prepare(), many).tiling == EXPANDED_TILINGS[0]
        wide = plan_expanded_heads(1, 2048, weights(8, None).prepare(), many).tiling
        assert wide == dataclasses.replace(EXPANDED_TILINGS[0], slots=3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: weights(group_size=40), {}, "multiple of 16 elements"),
        (lambda: weights().prepare(gated=True), {}, "gates and their values are no heads"),
        (lambda: weights().prepare(), dict(size=32), "heads must have 64 or 128 numbers, not 32"),
        (lambda: weights().prepare(), dict(length=63), "63 tokens do not fill tiles"),
        (lambda: weights().prepare(), dict(dtype=jnp.float32), "bfloat16 or float16"),
        (lambda: weights(8, None), dict(norms=True), "computed with weights laid out for tensor cores alone"),
        (lambda: weights().prepare(), dict(norms=True), "rotated heads of 128, not of heads without a rotation"),
    ],
)
def test_what_is_not_served_is_said(make, options, message):
    with interpreted(RACES), pytest.raises(Unsupported, match=message):
        plan_prompt_heads(*avals(make(), **options))


def test_tilings_that_heads_have_no_room_for_are_refused():
    cache, layout = jax.ShapeDtypeStruct((1, 1, 1, 128, 64), jnp.bfloat16), HeadLayout(6, 1, 64, 128)
    output = TransposedHeadOutput(keys=cache, layer=None, tables=None, values=cache, layout=layout)
    tiling = dataclasses.replace(EXPANDED_TILINGS[0], slots=4)
    problem = ExpandedProblem(128, layout.columns, None, tiling, w_bits=4, chunks=1)
    with pytest.raises(ValueError, match="takes 239104 bytes of shared memory of 228352 with heads of 64"):
        output.scratch(problem, staging_slots=1)
    narrow = dataclasses.replace(problem, tiling=dataclasses.replace(tiling, tile_m=80))
    with pytest.raises(ValueError, match="heads take tiles of a multiple of 64 tokens, got Tiling.tile_m=80"):
        output.scratch(narrow, staging_slots=1)


def test_the_outputs_offer_what_the_protocol_says():
    assert isinstance(TransposedHeadOutput(*[None] * 5), Output)
    assert isinstance(TransposedHeadWriter(*[None] * 9), Writer)
    assert isinstance(ExchangedHeadWriter(*[None] * 10), Writer)


def compiled(bits, group_size, size, tiling, *, rope=True, dtype=jnp.bfloat16, float_terms=None, norm_eps=None):
    """Of prompts that leave rows of tiles empty, with a bias: what takes the most registers."""
    batch, length, k, layout, w_format = 2, 1000, 4096, HeadLayout(8, 4, size, 1100, norm_eps), BipolarFormat(bits)
    m, n = batch * length, layout.columns
    vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)  # noqa: E731
    tiles, stages, terms = -(-n // 128), k // 128, None
    if group_size is not None:
        chunks = 128 // np.gcd(group_size, 128)
        terms = jax.ShapeDtypeStruct((tiles, PARTS, stages, *terms_shape(float_terms, chunks)), jnp.uint32)
    words = jax.ShapeDtypeStruct((tiles, PARTS, stages, bits, WORDS_PER_VECTOR), jnp.uint32)
    column = [jax.ShapeDtypeStruct((n, 1), dtype) for dtype in (jnp.float32, jnp.int32)]
    is_float = float_terms is not None and group_size < 64
    is_scaled = float_terms is not None and not is_float
    of_groups = () if float_terms is None else (column[0], float_terms)
    weights = PreparedArray(words, terms, *column, w_format, k, -2, group_size, False, None, *of_groups)
    recovery = (ScaledRecovery if is_scaled else ExpandedRecovery)("int8", A8, w_format, k, True, terms is not None)
    x_words = jax.ShapeDtypeStruct((1, m, k // 2 if is_float else k // 4), jnp.uint32)
    if is_float:
        recovery = ExpandedFloatRecovery("f16", k, w_format, True)
    if is_scaled:
        x_words = SummedTokens(x_words, jax.ShapeDtypeStruct((m, stages * chunks), jnp.float32))
    cache = jax.ShapeDtypeStruct((2, batch, layout.keys, layout.capacity, size), dtype)

    def project(x, weights, tokens, columns, keys, values, layer, tables, gains):
        rest = (recovery, tiling, layout, keys, values, layer, tables)
        return project_expanded_heads(x, weights, tokens, columns, *rest, length=length, gains=gains)

    return sm90_compile.compile_for_h200(
        project,
        x_words,
        weights,
        TokenTerms(
            None if float_terms else vector(m, jnp.int32),
            None if is_float else vector(m, jnp.int32),
            vector(m, jnp.float32),
        ),
        ColumnTerms(
            code_sums=None if float_terms else vector(n, jnp.int32),
            scaled_value_sums=vector(n, jnp.float32) if is_scaled else None,
            scale=vector(n, jnp.float32),
            offset=None if terms is not None else vector(n, jnp.float32),
            bias=vector(n, jnp.float32),
        ),
        cache,
        cache,
        jax.ShapeDtypeStruct((), jnp.int32),
        (jax.ShapeDtypeStruct((length, size // 2), jnp.int16),) * 2 if rope else None,
        None if norm_eps is None else (jax.ShapeDtypeStruct((size,), dtype),) * 2,
        ptx=True,
    )[1]


@needs_compiler
@pytest.mark.parametrize(
    ("bits", "group_size", "size", "options"),
    [
        (4, 128, 128, dict(tiling=EXPANDED_TILINGS[0])),
        (3, 16, 64, dict(tiling=Tiling(128, 128, "split_n", slots=3))),
        (8, None, 128, dict(tiling=Tiling(128, 128, "split_n", slots=3), dtype=jnp.float16)),
        (4, 64, 64, dict(tiling=EXPANDED_TILINGS[1], rope=False)),
        (6, 32, 128, dict(tiling=EXPANDED_TILINGS[2])),
        (4, 128, 128, dict(tiling=ONE_CHUNK_CANDIDATES[0], float_terms="offsets")),
        (4, 128, 128, dict(tiling=EXPANDED_TILINGS[0], norm_eps=1e-6)),
        (6, 32, 128, dict(tiling=EXPANDED_TILINGS[2], norm_eps=1e-6)),
        (4, 32, 128, dict(tiling=Tiling(128, 128, "split_n", slots=2), float_terms="offsets")),
        (8, 16, 128, dict(tiling=Tiling(64, 128, "alternate", slots=3), float_terms="offsets", norm_eps=1e-6)),
        (4, 32, 64, dict(tiling=Tiling(128, 128, "split_n", slots=2), float_terms="offsets", dtype=jnp.float16)),
        (4, 64, 128, dict(tiling=SCALED_CANDIDATES[1], float_terms="offsets", norm_eps=1e-6)),
        (5, 128, 64, dict(tiling=Tiling(64, 128, "alternate", slots=6), float_terms="zeros", dtype=jnp.float16)),
    ],
)
@pytest.mark.sample(1)
def test_it_compiles_without_spills(bits, group_size, size, options):
    report = compiled(bits, group_size, size, **options)
    assert len(report.registers) == 1
    assert report.spill_bytes == report.stack_bytes == 0
    assert not report.serialized_wgmma
    # Halves of 16-bit heads are transposed on their way to shared memory.
    assert ("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in report.text) == (size == 128)
