"""Signs that leave a product on Hopper are those of its numbers, quantized: simulated, interpreted, compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import weight_words
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES, plan_product
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.sign_packing import COUNT_BITS, SignPacking
from bipolar_jax.kernels.sm90.projections.sign_projection import project_signs
from bipolar_jax.kernels.sm90.quantize_rows.launch import quantize_and_pack
from bipolar_jax.packing.words import pack_codes
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("clean_interpreter")]

ONE_BIT = BipolarFormat(1)
SWIGLU = Activation("silu", gated=True)
needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def simulated(packing: SignPacking, numbers: np.ndarray, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Signs and summaries of [m, n] numbers of 16 bits, tile by tile; memory that is not written is 0xAB.."""
    signs, summaries = (
        np.full(shape, 0xABABABAB, np.uint32)
        for shape in ((1, packing.m, packing.row_words), (packing.tiles, packing.vector_length))
    )
    # One tile more than there are, as in clusters; numbers beyond m and n are infinite: counted, they would show.
    filled = np.full((-(-packing.m // 64) * 64, (packing.tiles + 1) * packing.tile_n), np.inf, numbers.dtype)
    filled[: packing.m, : packing.n] = numbers
    thread = np.arange(128)
    rows, columns = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
    with monkeypatch.context() as patch:
        warpgroup_simulator.install(patch)
        for row in range(0, len(filled), 64):
            for column in range(0, filled.shape[1], packing.tile_n):
                pairs = [
                    [
                        np.stack([filled[row + rows + half, column + j + columns + i] for i in range(2)], 1)
                        .view(np.int32)
                        .reshape(-1)
                        for j in range(0, packing.tile_n, 8)
                    ]
                    for half in (0, 8)
                ]
                origin = (warpgroup_simulator.int32(start) for start in (row, column))
                packing.store(pairs, *origin, signs, summaries)
    return signs, summaries


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("m", "n", "tile_n"), [(70, 203, 96), (3, 160, 96), (64, 256, 64), (65, 31, 32), (5, 96, 32), (2, 200, 192)]
)
def test_threads_write_signs_and_summaries(m, n, tile_n, dtype, monkeypatch):
    numbers = np.random.default_rng(0).standard_normal((m, n)).astype(dtype)
    numbers[0, :9] = [0.0, -0.0, np.inf, -np.inf, *np.array([1, -1], dtype) * np.finfo(np.float16).tiny, 1, -1, 2]
    numbers[1, n - 1], numbers[-1, 0] = np.nan, -700
    packing = SignPacking(numbers.dtype.name, m, n, tile_n)
    words, summaries = simulated(packing, numbers, monkeypatch)
    wide = numbers.astype(np.float32)
    codes = ~(wide < 0)
    expected = np.zeros_like(words)
    packed = np.asarray(pack_codes(jnp.asarray(codes, jnp.uint8), ONE_BIT))
    expected[..., : packed.shape[-1]] = packed
    np.testing.assert_array_equal(words, expected)
    magnitudes = (summaries[:, :m] >> COUNT_BITS).astype(np.uint16).view(numbers.dtype).astype(np.float32)
    for tile, start in enumerate(range(0, n, tile_n)):
        columns = slice(start, start + tile_n)
        np.testing.assert_array_equal(magnitudes[tile], np.abs(wide[:, columns]).max(axis=1))
        np.testing.assert_array_equal(summaries[tile, :m] & ((1 << COUNT_BITS) - 1), codes[:, columns].sum(axis=1))
    assert (summaries[:, m:] == 0xABABABAB).all()


@dataclasses.dataclass(frozen=True)
class Case:
    """A product that leaves signs."""

    tiling: Tiling
    m: int = 70
    n: int = 203
    dtype: type = jnp.bfloat16
    a_bits: int = 1
    activation: Activation | None = SWIGLU
    kind: str = "planes"


CASES = {
    "ragged": Case(Tiling(128, 192, "alternate", slots=3)),
    "clusters": Case(Tiling(64, 64, "alternate", slots=3, cluster_n=2), 67, 96, jnp.float16),
    "consumers share a tile": Case(Tiling(64, 128, "split_n", slots=2), 65, 130, activation=Activation("gelu")),
    "bytes, no activation": Case(Tiling(64, 128, "split_m", slots=3), 129, 64, a_bits=8, activation=None, kind="int8"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.covered("the kernel, by `make gpu-test`; its threads, by the tests beside")
def test_tokens_are_those_of_the_product_quantized(case):
    """With a row of zeros, one of NaN, and offsets of the columns."""
    k, interpret = 40, plgpu.InterpretGPUParams(detect_races=True)
    factors = 1 if case.activation is None else case.activation.parts
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(case.m, k)), case.dtype).at[3].set(0).at[5, 1].set(jnp.nan)
    # Of moderate size, since on CPUs what is below 2^-126 is 0, negative or not.
    w = bj.quantize(jnp.asarray(0.02 * rng.normal(size=(k, factors * case.n)), jnp.float32), 1, 0, None, "minmax")
    a_format = BipolarFormat(case.a_bits)
    tokens = quantize_and_pack(x, a_format, case.kind, interpret=interpret)
    args = (
        tokens.words,
        weight_words(w, case.kind),
        TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale),
        ColumnTerms(code_sums=w.row_sums[:, 0], scale=w.scale[:, 0], offset=w.offset[:, 0]),
        Recovery(case.kind, a_format, w.format, k, with_zero=case.a_bits > 1),
        case.tiling,
        case.dtype,
    )
    options = dict(activation=case.activation, blocks=2 * case.tiling.cluster_size, interpret=interpret)
    found = project_signs(*args, **options)
    assert not races_found()
    expected = quantize_and_pack(packed_matmul(*args, **options), ONE_BIT, "planes", interpret=interpret)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    rows = np.delete(np.arange(case.m), 5)
    np.testing.assert_array_equal(found.words[:, rows], expected.words[:, rows])
    for name in ("scale", "zero_code", "code_sums"):
        np.testing.assert_array_equal(getattr(found, name)[rows], getattr(expected, name)[rows], err_msg=name)
    assert found.scale[3] == 0
    # Codes of NaN are any on CPUs; the sum is of those that there are.
    assert np.isnan(found.scale[5])
    assert int(found.code_sums[5]) == np.bitwise_count(np.asarray(found.words[0, 5])).sum()


def compile_signs(tiling, n, k=4096, m=2048, *, kind="planes", a_bits=1, offsets=False, dtype=jnp.bfloat16):
    """Of a gated product with n columns."""
    a_format = BipolarFormat(a_bits)
    recovery = Recovery(kind, a_format, ONE_BIT, k, with_zero=a_bits > 1)
    words = -(-k // 128) * 4 if kind == "planes" else -(-k // 32) * 8
    vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)  # noqa: E731
    term = vector(n, jnp.float32) if offsets else None

    def signs(x, w, tokens, columns):
        return project_signs(x, w, tokens, columns, recovery, tiling, dtype, SWIGLU)

    _, report = sm90_compile.compile_for_h200(
        signs,
        jax.ShapeDtypeStruct((a_bits if kind == "planes" else 1, m, words), jnp.uint32),
        jax.ShapeDtypeStruct((1, n, words), jnp.uint32),
        TokenTerms(vector(m, jnp.int32), vector(m, jnp.int32), vector(m, jnp.float32)),
        ColumnTerms(vector(n, jnp.int32), vector(n, jnp.float32), term, None, term),
    )
    assert report.registers
    assert report.spill_bytes == 0
    assert not report.serialized_wgmma


@needs_compiler
@pytest.mark.parametrize("m", [1024, 2048])
@pytest.mark.covered("tilings, by the test below; those of llama, by `make gpu-test`")
def test_those_of_llama_compile_without_spills(m):
    compile_signs(plan_product(m, 22016, 4096, ONE_BIT, ONE_BIT).tiling, 22016, m=m)


@needs_compiler
@pytest.mark.parametrize("tiling", CANDIDATES, ids=lambda t: f"{t.tile_m}x{t.tile_n}-{t.slots}")
@pytest.mark.sample(1)
def test_every_tiling_compiles_without_spills(tiling):
    """What takes the most registers: offsets, a bias, and columns that end within a word."""
    compile_signs(tiling, 22026, a_bits=2, offsets=True)


@needs_compiler
@pytest.mark.parametrize(
    ("tiling", "options"),
    [
        (Tiling(128, 192, "alternate", slots=4, cluster_m=2), {"dtype": jnp.float16, "offsets": True}),
        (Tiling(128, 192, "alternate", slots=4, cluster_n=2), {"kind": "int8", "a_bits": 8, "offsets": True}),
    ],
    ids=str,
)
@pytest.mark.covered("what takes the most registers, by the test above; operands, by `make gpu-test`")
def test_other_operands_compile_without_spills(tiling, options):
    compile_signs(tiling, 22016, **options)
