"""The Hopper product kernel: exact in Pallas' interpret mode, with no races."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT
from bipolar_jax.kernels.sm90 import entry as sm90
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words, expand_planes
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.launch import launch
from bipolar_jax.kernels.sm90.gemm.outputs.dense import DenseOutput, DenseWriter
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.gemm.outputs.heads import HeadOutput, HeadWriter
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Output, Writer
from bipolar_jax.kernels.sm90.gemm.outputs.signs import SignOutput, SignWriter
from bipolar_jax.kernels.sm90.gemm.problem import Problem
from bipolar_jax.packing.words import pack_codes
from tests.support.integer_products import (
    A_FORMATS,
    EXTREME_PAIRS,
    W_FORMATS,
    codes_with_extremes,
    expected_product,
    packed,
    random_codes,
)
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


def detecting_races() -> plgpu.InterpretGPUParams:
    return plgpu.InterpretGPUParams(detect_races=True)


def no_races() -> bool:
    return not races_found()


def operand(codes: np.ndarray, fmt: BipolarFormat, kind: str, *, weights: bool = False):
    if weights and kind == "int8":
        return expand_planes(pack_codes(jnp.asarray(codes), fmt), fmt)
    return code_words(jnp.asarray(codes), fmt, kind)


def code_sums(codes: np.ndarray | jax.Array):
    return jnp.asarray(codes).sum(axis=1, dtype=jnp.int32)


def integer_product(x, a_format, w, w_format, kind, tiling, blocks):
    zeros = jnp.zeros(x.shape[0], jnp.int32)
    return packed_matmul(
        operand(x, a_format, kind),
        operand(w, w_format, kind, weights=True),
        TokenTerms(code_sums(x), zeros, None),
        ColumnTerms(code_sums=code_sums(w)),
        Recovery(kind, a_format, w_format, x.shape[1], with_zero=False),
        tiling,
        jnp.int32,
        blocks=blocks,
        interpret=detecting_races(),
    )


@pytest.mark.parametrize(("a_format", "w_format"), EXTREME_PAIRS, ids=lambda fmt: fmt.name)
@pytest.mark.sample(2)
def test_pairs_of_formats_are_exact(a_format, w_format):
    """With the planned tiling; K ends within a word. The test of Horner's rule has all pairs."""
    m, n, k = 70, 5, 70
    assert m > FEW_TOKENS_LIMIT, "fewer tokens are another kernel's"
    x, w = codes_with_extremes(a_format, m, k, seed=1), codes_with_extremes(w_format, n, k, seed=2)
    with interpreted(detecting_races()):
        product = sm90.integer_matmul(jnp.asarray(x), packed(w, w_format, None), a_format)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None))
    assert no_races()


@pytest.mark.parametrize(
    ("cluster_m", "cluster_n", "schedule"),
    [
        *itertools.product((1,), (1,), ("split_m", "split_n", "alternate")),
        *itertools.product((2,), (2,), ("split_m", "split_n", "alternate")),
        # Which axis is shared concerns the loads, which are the same in every schedule.
        (2, 1, "alternate"),
        (1, 2, "alternate"),
    ],
)
@pytest.mark.sample(2)
def test_every_schedule_and_cluster_is_exact_and_has_no_races(schedule, cluster_m, cluster_n):
    """More tiles than blocks, more steps than slots, ragged in every direction, two pairs of one weight."""
    tiling = Tiling(64, 64, schedule, 2, cluster_m, cluster_n, band=2, band_axis="m")
    a_format, w_format = BipolarFormat(1), TERNARY
    x, w = random_codes(a_format, 300, 1100, 0), random_codes(w_format, 210, 1100, 1)
    product = integer_product(x, a_format, w, w_format, "planes", tiling, blocks=2 * tiling.cluster_size)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None)[..., 0])
    assert no_races()


@pytest.mark.parametrize("kind", ["planes", "int8"])
@pytest.mark.parametrize(("tile_m", "tile_n", "splits"), [(128, 192, 1), (64, 256, 2), (128, 64, 3)])
@pytest.mark.sample(2)
def test_every_kind_of_operand_and_tile_is_exact(kind, tile_m, tile_n, splits):
    """Some with K split, of planes with splits behind its end."""
    a_format, w_format = BipolarFormat(3), BipolarFormat(2)
    x, w = random_codes(a_format, 150, 200, 0), random_codes(w_format, 270, 200, 1)
    tiling = Tiling(tile_m, tile_n, "alternate", slots=3, splits=splits)
    product = integer_product(x, a_format, w, w_format, kind, tiling, blocks=2)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None)[..., 0])
    assert no_races()


def test_no_chunk_of_output_overwrites_one_in_flight():
    """3 slots for 8 chunks, several tiles a consumer: the next tile starts where the last did not end."""
    tiling = Tiling(128, 128, "alternate", slots=5)
    assert tiling.staging_slots() == 3
    fmt = BipolarFormat(1)
    w = random_codes(fmt, 256, 64, 1)
    multiply = jax.jit(lambda x, w: integer_product(x, fmt, w, fmt, "planes", tiling, blocks=1))
    for seed in range(3):  # which of two racing threads comes first is chance
        x = random_codes(fmt, 512, 64, seed)
        np.testing.assert_array_equal(multiply(x, w), expected_product(x, fmt, w, fmt, None)[..., 0])
        assert no_races()


@pytest.mark.parametrize(
    ("tiling", "dtype", "staging"),
    [
        (Tiling(128, 128, "alternate", slots=4), jnp.bfloat16, 4),
        (Tiling(128, 128, "alternate", slots=5), jnp.bfloat16, 3),
        (Tiling(128, 128, "alternate", slots=6), jnp.float32, 1),
        (Tiling(64, 128, "split_m", slots=5, cluster_m=2, cluster_n=2), jnp.float16, 2),
        (Tiling(64, 64, "split_n", slots=3), jnp.float32, 1),
    ],
    ids=str,
)
@pytest.mark.sample(1)
def test_a_residual_arrives_before_its_chunk_and_is_added(tiling, dtype, staging):
    """More chunks than slots, several tiles a consumer, ragged in every direction."""
    assert tiling.staging_slots() == staging
    m, n, k, a_format, w_format = 300, 203, 200, BipolarFormat(1), BipolarFormat(2)
    x, w = random_codes(a_format, m, k, 0), random_codes(w_format, n, k, 1)
    residual = jnp.asarray(50 * np.random.default_rng(2).standard_normal((m, n)), dtype)

    def product(residual):
        return packed_matmul(
            operand(x, a_format, "planes"),
            operand(w, w_format, "planes", weights=True),
            TokenTerms(code_sums(x), jnp.zeros(m, jnp.int32), jnp.full(m, 0.3)),
            ColumnTerms(code_sums=code_sums(w), scale=jnp.full(n, 0.7)),
            Recovery("planes", a_format, w_format, k, with_zero=False),
            tiling,
            dtype,
            residual=residual,
            blocks=tiling.cluster_size,
            interpret=detecting_races(),
        )

    found = product(residual)
    assert no_races()
    expected = residual + product(None)
    # In float32 the multiplication before may be contracted with the addition.
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=0, atol=3e-5 * (dtype == jnp.float32)
    )


def test_horners_rule_adds_every_pair_with_its_weight():
    for a_format, w_format in itertools.product(A_FORMATS, W_FORMATS):
        weights, total = {}, 0
        for factor, pairs in Recovery("planes", a_format, w_format, 1, with_zero=False).pair_groups():
            weights = {pair: weight * factor for pair, weight in weights.items()} | dict.fromkeys(pairs, 1)
            total += len(pairs)
        expected = {
            (i, j): p * q
            for (i, p), (j, q) in itertools.product(
                enumerate(a_format.plane_weights), enumerate(w_format.plane_weights)
            )
        }
        assert weights == expected
        assert total == len(expected)


@pytest.mark.parametrize(
    ("schedule", "group_size"), [("split_m", 32), ("split_n", 64), ("alternate", 128), ("split_m", 512)]
)
@pytest.mark.sample(1)
def test_group_scales(schedule, group_size):
    a_format, w_format, k = BipolarFormat(8), BipolarFormat(7), 1100
    groups = -(-k // group_size)
    rng = np.random.default_rng(0)
    x, w = random_codes(a_format, 70, k, 0), random_codes(w_format, 140, k, 1)
    scale = rng.random((140, groups), np.float32)
    group_products = expected_product(x, a_format, w, w_format, group_size)
    value_sums = np.stack(
        [(2 * w[:, i : i + group_size].astype(int) - w_format.max_value).sum(1) for i in range(0, k, group_size)], 1
    )
    product = packed_matmul(
        operand(x, a_format, "int8"),
        operand(w, w_format, "int8", weights=True),
        TokenTerms(code_sums(x), jnp.zeros(70, jnp.int32), jnp.ones(70)),
        ColumnTerms(scaled_value_sums=jnp.asarray((scale * value_sums).sum(1), jnp.float32)),
        Recovery("int8", a_format, w_format, k, with_zero=False),
        Tiling(64, 64, schedule, slots=2),
        jnp.float32,
        group_size=group_size,
        group_terms=GroupTerms(jnp.asarray(scale.T)),
        blocks=2,
        interpret=detecting_races(),
    )
    expected = (group_products * scale).sum(-1)
    np.testing.assert_allclose(product, expected, atol=1e-6 * np.abs(expected).max())
    assert no_races()


def test_tilings_that_do_not_fit_are_refused():
    for tiling, message in [
        (Tiling(96, 128), "tile_m must be 64 or 128"),
        (Tiling(128, 256), "does not fit a warpgroup's registers"),
        (Tiling(128, 192, slots=9), "bytes of shared memory"),
        (Tiling(64, 64, slots=1), "at least 2 slots"),
        (Tiling(64, 192, "split_n", slots=2), "at most 256 rows"),
        (Tiling(64, 64, "both"), "schedule must be one of split_m, split_n, alternate"),
        (Tiling(64, 64, cluster_m=4), "clusters have 1 or 2 blocks"),
        (Tiling(64, 64, splits=0), "splits must be 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiling.check()
    with pytest.raises(ValueError, match="registers"):
        Tiling(128, 128).check(group_bytes=512)
    fmt = BipolarFormat(1)
    with pytest.raises(ValueError, match="splits K: neither several sequences"):
        Problem(64, 64, Recovery("planes", fmt, fmt, 128, False), Tiling(64, 64, splits=2), sequences=2)


OUTPUTS = [
    (DenseOutput(None, jnp.dtype(jnp.bfloat16)), DenseWriter(*[None] * 6)),
    (HeadOutput(None, None, None, None, HeadLayout(1, 1, 64, 64)), HeadWriter(*[None] * 9)),
    (SignOutput(jnp.dtype(jnp.bfloat16)), SignWriter(*[None] * 4)),
]


@pytest.mark.parametrize(("output", "writer"), OUTPUTS, ids=lambda side: type(side).__name__)
def test_outputs_offer_what_the_protocol_says(output, writer):
    assert isinstance(output, Output)
    assert isinstance(writer, Writer)


def test_an_output_with_tokens_along_the_other_axis_is_refused():
    class TransposedOutput(DenseOutput):
        token_axis = 1

    fmt = BipolarFormat(1)
    problem = Problem(64, 64, Recovery("planes", fmt, fmt, 128, with_zero=False), Tiling(64, 64, slots=2))
    words, ones = jnp.zeros((1, 64, 4), jnp.uint32), jnp.ones(64, jnp.int32)
    output = TransposedOutput(None, jnp.dtype(jnp.int32))
    with pytest.raises(ValueError, match="tokens are axis 0 of the accumulator, but TransposedOutput takes them"):
        launch(problem, (words, words), TokenTerms(ones, ones, None), ColumnTerms(code_sums=ones), output)
