"""The product of few tokens: exact in interpret mode, with no races, and compiled for the chip without spills."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.sm90 import entry as sm90
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.planning import plan_product
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import (
    DecodeTiling,
    decode_tiling,
    decode_tilings,
    parted_tiling,
    token_columns,
    x_planes,
)
from bipolar_jax.kernels.sm90.gemm_few_tokens.groups import WeightGroups
from bipolar_jax.kernels.sm90.gemm_few_tokens.launch import decode_matmul
from tests.support import sm90_compile
from tests.support.integer_products import (
    EXTREME_PAIRS,
    codes_with_extremes,
    expected_product,
    packed,
    random_codes,
)
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("clean_interpreter")]


def integers(x: np.ndarray, w: np.ndarray, a_format, w_format, **fields) -> np.ndarray:
    """The kernel's integer product of codes, interpreted, with the race detector on."""
    recovery = Recovery("planes", a_format, w_format, x.shape[1], with_zero=False)
    x_sums, w_sums = (jnp.asarray(codes.sum(axis=1, dtype=np.int32)) for codes in (x, w))
    product = decode_matmul(
        code_words(jnp.asarray(x), a_format, "planes"),
        code_words(jnp.asarray(w), w_format, "planes"),
        TokenTerms(x_sums, 0 * x_sums, None),
        ColumnTerms(code_sums=w_sums),
        recovery,
        jnp.int32,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        **fields,
    )
    assert not races_found()
    return np.asarray(product)


@pytest.mark.parametrize(("a_format", "w_format"), EXTREME_PAIRS, ids=lambda fmt: fmt.name)
@pytest.mark.sample(2)
def test_pairs_of_formats_are_exact(a_format, w_format):
    """With the planned tiling; K ends within a word."""
    x, w = codes_with_extremes(a_format, 3, 70, seed=1), codes_with_extremes(w_format, 5, 70, seed=2)
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        product = sm90.integer_matmul(jnp.asarray(x), packed(w, w_format, None), a_format)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None))
    assert not races_found()


@pytest.mark.parametrize(
    ("m", "n", "k", "a_bits", "w_format"),
    [
        (1, 64, 1024, 1, BipolarFormat(1)),
        (1, 100, 2500, 8, BipolarFormat(2)),
        (3, 70, 1500, 3, BipolarFormat(4)),
        (9, 64, 300, 8, BipolarFormat(8)),
        (5, 1, 2100, 4, TERNARY),
        (32, 65, 33, 8, BipolarFormat(3)),
        (64, 64, 1, 2, BipolarFormat(5)),
        (2, 64, 96, 7, BipolarFormat(1)),
        (40, 64, 96, 3, BipolarFormat(2)),
    ],
)
@pytest.mark.sample(2)
def test_products_are_exact(m, n, k, a_bits, w_format):
    a_format = BipolarFormat(a_bits)
    x, w = random_codes(a_format, m, k, 0), random_codes(w_format, n, k, 1)
    product = integers(x, w, a_format, w_format)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None)[..., 0])


@pytest.mark.parametrize(
    ("tiling", "blocks"),
    [(DecodeTiling(4, 2, 2), 1), (DecodeTiling(3, 3, 1), 2), (DecodeTiling(2, 8, 2), 1), (DecodeTiling(1, 1, 1), 3)],
    ids=str,
)
@pytest.mark.sample(1)
def test_rings_run_on_across_tiles(tiling, blocks):
    """More tiles than blocks, parts of K beyond its end, rings deeper and shallower than a tile's work."""
    a_format, w_format = BipolarFormat(2), BipolarFormat(3)
    x, w = random_codes(a_format, 2, 4500, 2), random_codes(w_format, 300, 4500, 3)
    product = integers(x, w, a_format, w_format, tiling=tiling, blocks=blocks)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None)[..., 0])


@pytest.mark.parametrize(
    ("m", "n", "k", "a_bits", "w_format", "blocks"),
    [
        (33, 70, 1100, 8, BipolarFormat(2), 132),
        (48, 64, 200, 8, BipolarFormat(4), 1),
        (64, 130, 96, 8, BipolarFormat(1), 4),
        (64, 65, 1500, 5, TERNARY, 3),
        (41, 64, 64, 7, BipolarFormat(3), 132),
    ],
)
@pytest.mark.sample(1)
def test_parts_of_the_tokens_are_exact(m, n, k, a_bits, w_format, blocks):
    """More planes than an instruction has columns; blocks that have both parts of a tile, or one, or of several."""
    a_format = BipolarFormat(a_bits)
    x, w = random_codes(a_format, m, k, 0), random_codes(w_format, n, k, 1)
    tiling = parted_tiling(m, k, a_bits, w_format.bits)
    assert tiling.parts == 2
    product = integers(x, w, a_format, w_format, tiling=tiling, blocks=blocks)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None)[..., 0])


@pytest.mark.parametrize("m", [1, 6, 40, 64])
@pytest.mark.sample(1)
def test_scales_zero_codes_offsets_and_bias(m):
    a_format, w_format = BipolarFormat(4), BipolarFormat(3)
    k, n, rng = 700, 90, np.random.default_rng(4)
    x, w = random_codes(a_format, m, k, 5), random_codes(w_format, n, k, 6)
    zero_code = rng.integers(0, a_format.max_value + 1, m).astype(np.int32)
    x_scale, w_scale, offset, bias = (rng.normal(size=size).astype(np.float32) for size in (m, n, n, n))
    tiling = dataclasses.replace(decode_tiling(24, k, 4), parts=3) if m == 64 else None
    product = decode_matmul(
        code_words(jnp.asarray(x), a_format, "planes"),
        code_words(jnp.asarray(w), w_format, "planes"),
        TokenTerms(jnp.asarray(x.sum(axis=1, dtype=np.int32)), jnp.asarray(zero_code), jnp.asarray(x_scale)),
        ColumnTerms(jnp.asarray(w.sum(axis=1, dtype=np.int32)), *map(jnp.asarray, (w_scale, offset)), bias=bias),
        Recovery("planes", a_format, w_format, k, with_zero=True),
        jnp.float32,
        tiling=tiling,
        interpret=plgpu.InterpretGPUParams(),
    )
    x_hat = 2.0 * (x - zero_code[:, None].astype(float)) * x_scale[:, None]
    w_hat = w_scale[:, None].astype(float) * (2.0 * w - w_format.max_value) + offset[:, None]
    exact = x_hat @ w_hat.T + bias
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("group_size", "m", "n", "k", "a_bits", "w_bits", "offsets"),
    [
        (64, 1, 70, 2100, 8, 4, False),
        (64, 1, 70, 2100, 8, 4, True),
        (128, 3, 64, 1500, 4, 3, False),
        (128, 1, 100, 4400, 1, 8, True),
        (256, 2, 64, 700, 8, 2, False),
        (512, 1, 30, 2500, 3, 1, True),
        (1024, 9, 64, 2048, 2, 4, False),
        (1024, 9, 64, 2048, 2, 4, True),
    ],
)
@pytest.mark.sample(1)
def test_groups_have_scales_of_their_own(group_size, m, n, k, a_bits, w_bits, offsets):
    a_format, w_format, rng = BipolarFormat(a_bits), BipolarFormat(w_bits), np.random.default_rng(7)
    x, w, groups = random_codes(a_format, m, k, 8), random_codes(w_format, n, k, 9), -(-k // group_size)
    zero_code = rng.integers(0, a_format.max_value + 1, m).astype(np.int32) * (a_bits > 1)
    x_scale, bias = rng.normal(size=m).astype(np.float32), rng.normal(size=n).astype(np.float32)
    scale, offset = rng.normal(size=(2, n, groups)).astype(np.float32)
    starts = np.arange(0, k, group_size)
    product = decode_matmul(
        code_words(jnp.asarray(x), a_format, "planes"),
        code_words(jnp.asarray(w), w_format, "planes"),
        TokenTerms(jnp.asarray(x.sum(axis=1, dtype=np.int32)), jnp.asarray(zero_code), jnp.asarray(x_scale)),
        ColumnTerms(bias=jnp.asarray(bias)),
        Recovery("planes", a_format, w_format, k, with_zero=a_bits > 1),
        jnp.float32,
        groups=WeightGroups(
            jnp.asarray(scale),
            jnp.asarray(np.add.reduceat(w, starts, axis=1, dtype=np.int32)),
            jnp.asarray(offset) if offsets else None,
            group_size,
        ),
        blocks=1,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert not races_found()
    zero = a_format.max_value / 2 if a_bits == 1 else zero_code[:, None]
    x_hat = 2.0 * (x - zero) * x_scale[:, None]
    of_elements = [np.repeat(term, group_size, axis=1)[:, :k].astype(float) for term in (scale, offset)]
    w_hat = of_elements[0] * (2.0 * w - w_format.max_value) + offsets * of_elements[1]
    exact = x_hat @ w_hat.T + bias
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=2e-6 * np.abs(exact).max())


needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def test_every_width_has_a_tiling_that_fits():
    for a_bits in range(1, 9):
        for m in range(1, FEW_TOKENS_LIMIT + 1):
            if x_planes(m, a_bits) * token_columns(m) <= 256:
                tiling = decode_tiling(m, 4096, a_bits, 4)
                assert tiling.warpgroups >= 1
                assert tiling.w_slots >= 3
                assert plan_product(m, 4096, 4096, BipolarFormat(a_bits), BipolarFormat(4)).tiling == tiling
            else:
                with pytest.raises(NotImplementedError, match="columns, more than 256"):
                    decode_tiling(m, 4096, a_bits)
                parted = parted_tiling(m, 4096, a_bits, 2)
                assert parted.parts == 2
                assert parted.w_slots >= 3
                # The last part is not empty: nothing is stored beyond the tokens alone.
                assert (parted.parts - 1) * token_columns(parted.part_tokens(m)) < m
                assert plan_product(m, 4096, 4096, BipolarFormat(a_bits), BipolarFormat(2)).tiling == parted


def test_groups_take_tokens_in_one_part():
    terms = jnp.zeros((8, 1))
    with pytest.raises(ValueError, match="in one part, not in 2"):
        decode_matmul(
            jnp.zeros((8, 40, 4), jnp.uint32),
            jnp.zeros((1, 8, 4), jnp.uint32),
            TokenTerms(jnp.zeros(40, jnp.int32), jnp.zeros(40, jnp.int32), None),
            ColumnTerms(),
            Recovery("planes", BipolarFormat(8), BipolarFormat(1), 96, with_zero=False),
            jnp.float32,
            groups=WeightGroups(terms, terms.astype(jnp.int32), None, 128),
            tiling=parted_tiling(40, 96, 8, 4),
        )


def test_rows_that_tma_cannot_address_are_refused():
    with pytest.raises(ValueError, match="multiples of 4 words, got 3 words of x"):
        decode_matmul(
            jnp.zeros((1, 1, 3), jnp.uint32),
            jnp.zeros((1, 8, 4), jnp.uint32),
            TokenTerms(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), None),
            ColumnTerms(code_sums=jnp.zeros(8, jnp.int32)),
            Recovery("planes", BipolarFormat(1), BipolarFormat(1), 96, with_zero=False),
            jnp.int32,
        )


@needs_compiler
@pytest.mark.parametrize(
    ("m", "n", "k", "a_bits", "w_bits", "group_size"),
    [
        (1, 4096, 4096, 1, 1, None),
        (1, 22016, 4096, 8, 8, None),
        (1, 4096, 11008, 8, 4, None),
        (16, 4096, 4096, 8, 4, None),
        (32, 4096, 4096, 8, 2, None),
        (64, 4096, 4096, 4, 4, None),
        (64, 4096, 4096, 2, 2, None),
        (53, 12, 123, 3, 1, None),
        (6, 217, 689, 7, 5, None),
        (33, 4096, 4096, 8, 4, None),
        (48, 22016, 4096, 8, 2, None),
        (64, 4096, 11008, 8, 1, None),
        (64, 4096, 4096, 8, 8, None),
        (64, 217, 689, 5, 3, None),
        (1, 4096, 4096, 8, 4, 64),
        (1, 4096, 11008, 8, 4, 128),
        (1, 4096, 4096, 8, 8, 128),
        (16, 4096, 4096, 8, 4, 128),
        (30, 200, 4096, 8, 2, 256),
        (64, 4096, 4096, 4, 4, 1024),
    ],
)
@pytest.mark.sample(2)
def test_kernels_compile_without_spills(m, n, k, a_bits, w_bits, group_size):
    compile_product(
        m, n, k, a_bits, w_bits, group_size, parted_tiling(m, k, a_bits, w_bits) if group_size is None else None
    )


@needs_compiler
@pytest.mark.parametrize("a_bits", [8, 4])
@pytest.mark.parametrize("choice", range(1, 8))
@pytest.mark.covered("the tilings that are chosen without a table, by the test above; all, by `make gpu-test`")
def test_tilings_that_only_a_table_chooses_compile_without_spills(a_bits, choice):
    m = 1 if choice % 2 else 16
    compile_product(m, 4096, 4096, a_bits, 4, None, decode_tilings(m, 4096, a_bits, 4)[choice])


def compile_product(m, n, k, a_bits, w_bits, group_size, tiling):
    recovery = Recovery("planes", BipolarFormat(a_bits), BipolarFormat(w_bits), k, with_zero=a_bits > 1)

    words = -(-k // 128) * 4

    def vector(size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((-(-size // 4) * 4,), dtype)

    def matrix(dtype):
        return jax.ShapeDtypeStruct((n, -(-k // group_size)), dtype)

    columns = ColumnTerms(code_sums=vector(n, jnp.int32), scale=vector(n), offset=vector(n), bias=vector(n))
    groups = None
    if group_size is not None:
        columns = ColumnTerms()
        groups = WeightGroups(matrix(jnp.float32), matrix(jnp.int32), matrix(jnp.float32), group_size)
    _, report = sm90_compile.compile_for_h200(
        lambda x, w, tokens, columns, groups: decode_matmul(
            x, w, tokens, columns, recovery, jnp.bfloat16, groups=groups, tiling=tiling
        ),
        jax.ShapeDtypeStruct((a_bits, m, words), jnp.uint32),
        jax.ShapeDtypeStruct((w_bits, n, words), jnp.uint32),
        TokenTerms(vector(m, jnp.int32), vector(m, jnp.int32), vector(m)),
        columns,
        groups,
    )
    assert report.registers
    assert report.spill_bytes == 0
    assert not report.serialized_wgmma
