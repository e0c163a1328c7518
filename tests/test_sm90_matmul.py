"""The Hopper products: exact in Pallas' interpret mode, with no races, and compiled for the chip without spills."""

from __future__ import annotations

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sm90_compile
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels import sm90
from bipolar_jax.kernels.sm90 import execution, plan
from bipolar_jax.kernels.sm90.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.execution import interpreted
from bipolar_jax.kernels.sm90.matmul import packed_matmul
from bipolar_jax.kernels.sm90.operand_words import code_words, expand_planes
from bipolar_jax.kernels.sm90.plan import CANDIDATES, GROUPED_CANDIDATES, estimated_cycles, plan_product
from bipolar_jax.kernels.sm90.recovery import Recovery
from bipolar_jax.kernels.sm90.tensor_core import ELEMENTS_PER_ROW
from bipolar_jax.kernels.sm90.tiling import Tiling
from bipolar_jax.packing.words import pack_codes
from bipolar_jax.tuning.table import load_table, nearest_entry
from tests.integer_products import (
    A_FORMATS,
    W_FORMATS,
    codes_with_extremes,
    expected_product,
    packed,
    random_codes,
)

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter", "quick_compilation")]


def detecting_races() -> plgpu.InterpretGPUParams:
    return plgpu.InterpretGPUParams(detect_races=True)


def no_races() -> bool:
    return not interpret_pallas_call.get_races().races_found


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


@pytest.mark.parametrize("w_format", W_FORMATS, ids=lambda fmt: f"W{fmt.name}")
@pytest.mark.parametrize("a_format", A_FORMATS, ids=lambda fmt: f"A{fmt.name}")
def test_every_pair_is_exact(a_format, w_format):
    """K crosses a word, a row of bytes and a row of bits of no whole length."""
    k = 70
    x, w = codes_with_extremes(a_format, 3, k, seed=1), codes_with_extremes(w_format, 5, k, seed=2)
    with interpreted(detecting_races()):
        product = sm90.integer_matmul(jnp.asarray(x), packed(w, w_format, None), a_format)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None))
    assert no_races()


@pytest.mark.parametrize(
    ("cluster_m", "cluster_n", "consumers", "schedule"),
    [
        *itertools.product((1,), (1,), (2, 3), ("split_m", "split_n", "alternate")),
        *itertools.product((2,), (2,), (2,), ("split_m", "split_n", "alternate")),
        # Which axis is shared concerns the loads, which are those of every schedule.
        (2, 1, 2, "alternate"),
        (1, 2, 2, "alternate"),
    ],
)
def test_every_schedule_and_cluster_is_exact_and_has_no_races(schedule, cluster_m, cluster_n, consumers):
    """More tiles than blocks, more steps than slots, ragged in every direction, two pairs of one weight."""
    tiling = Tiling(64, 64, schedule, 2, cluster_m, cluster_n, band=2, band_axis="m", consumers=consumers)
    a_format, w_format = BipolarFormat(1), TERNARY
    x, w = random_codes(a_format, 300, 1100, 0), random_codes(w_format, 210, 1100, 1)
    product = integer_product(x, a_format, w, w_format, "planes", tiling, blocks=2 * tiling.cluster_size)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None)[..., 0])
    assert no_races()


@pytest.mark.parametrize("kind", ["planes", "int8"])
@pytest.mark.parametrize(("tile_m", "tile_n"), [(128, 192), (64, 256), (128, 64)])
def test_every_kind_of_operand_and_tile_is_exact(kind, tile_m, tile_n):
    a_format, w_format = BipolarFormat(3), BipolarFormat(2)
    x, w = random_codes(a_format, 150, 200, 0), random_codes(w_format, 270, 200, 1)
    product = integer_product(x, a_format, w, w_format, kind, Tiling(tile_m, tile_n, "alternate", slots=3), blocks=2)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, None)[..., 0])
    assert no_races()


def test_no_piece_of_output_overwrites_one_on_its_way():
    """3 slots for 8 pieces, several tiles a consumer: the next tile starts where the last did not end."""
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
def test_a_residual_arrives_before_its_piece_and_is_added(tiling, dtype, staging):
    """More pieces than slots, several tiles a consumer, ragged in every direction."""
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


@pytest.mark.parametrize("fmt", W_FORMATS, ids=lambda fmt: f"W{fmt.name}")
def test_bytes_of_weights_are_values_or_signed_codes(fmt):
    codes = random_codes(fmt, 4, 64, 0)
    codes[0, : fmt.max_value + 1] = np.arange(min(64, fmt.max_value + 1))
    expected = np.asarray(fmt.values(jnp.asarray(codes)) if fmt.max_value < 128 else fmt.signed_codes(codes))
    words = np.asarray(expand_planes(pack_codes(jnp.asarray(codes), fmt), fmt))
    # Byte t of word 8 B + j is element 32 B + 8 t + j.
    in_order = words.view(np.int8).reshape(4, 2, 8, 4).swapaxes(2, 3).reshape(4, 64)
    np.testing.assert_array_equal(in_order, expected)


@pytest.mark.parametrize(
    ("w_bits", "a_bits", "group_size", "offset", "dtype"),
    [
        (1, 1, None, True, jnp.float32),
        (2, 3, None, False, jnp.bfloat16),
        (4, 8, None, True, jnp.float16),
        (8, 8, None, False, jnp.bfloat16),
        (4, 8, 128, False, jnp.float32),
        (4, 8, 64, True, jnp.float32),
        (8, 1, 128, False, jnp.float32),
        (8, 8, 32, True, jnp.float32),
    ],
)
def test_the_whole_product_is_that_of_xla(w_bits, a_bits, group_size, offset, dtype):
    rng = np.random.default_rng(w_bits)
    calibration = "minmax" if offset else "absmax"
    w = bj.quantize(rng.normal(size=(200, 30)).astype(np.float32), w_bits, 0, group_size, calibration)
    x = jnp.asarray(rng.normal(size=(9, 200)), dtype).at[3].set(0)
    bias = jnp.asarray(rng.normal(size=30), dtype)
    with interpreted(detecting_races()):
        y = bj.matmul(x, w, a_bits, bias=bias, implementation="sm90")
    expected = np.asarray(bj.matmul(x.astype(jnp.float32), w, a_bits, bias=bias, implementation="xla"))
    assert y.dtype == dtype
    # XLA rounds an element of x that lies between two codes one way or the other; one step of one element.
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(y[3], bias)
    assert no_races()


@pytest.mark.parametrize(
    ("schedule", "group_size"), [("split_m", 32), ("split_n", 64), ("alternate", 128), ("split_m", 512)]
)
def test_group_scales(schedule, group_size):
    a_format, w_format, k = BipolarFormat(8), BipolarFormat(7), 1100
    groups = -(-k // group_size)
    rng = np.random.default_rng(0)
    x, w = random_codes(a_format, 70, k, 0), random_codes(w_format, 140, k, 1)
    scale = rng.random((140, groups), np.float32)
    parts = expected_product(x, a_format, w, w_format, group_size)
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
    expected = (parts * scale).sum(-1)
    np.testing.assert_allclose(product, expected, atol=1e-6 * np.abs(expected).max())
    assert no_races()


def test_what_is_not_served_goes_to_xla():
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(96, 8)).astype(np.float32), jnp.ones((2, 96))
    unserved = {
        "groups must have 32, 64 or a multiple of 128 elements up to 1024, not 48": (bj.quantize(kernel, 4, 0, 48), 8),
        "float activations must be bfloat16 or float16": (bj.quantize(kernel, 4, 0), None),
    }
    long = bj.from_codes(np.zeros((1, 131072), int), 1, -1, np.ones((1, 1), np.float32)).T
    with interpreted(plgpu.InterpretGPUParams()):
        for reason, (w, a_bits) in unserved.items():
            explanation = bj.explain(x, w, a_bits)
            assert explanation.implementation == "xla"
            assert reason in explanation.passed_over["sm90"]
            with pytest.raises(NotImplementedError, match=reason):
                bj.matmul(x, w, a_bits, implementation="sm90")
            np.testing.assert_array_equal(bj.matmul(x, w, a_bits), bj.matmul(x, w, a_bits, implementation="xla"))
        assert "a row takes 524288 bytes" in bj.explain(jnp.ones((1, 131072)), long, 1).passed_over["sm90"]


def test_kernels_are_explained():
    kernel, many, few = np.ones((96, 8), np.float32), jnp.ones((70, 96)), jnp.ones((2, 96))
    with interpreted(plgpu.InterpretGPUParams()):
        assert bj.explain(many, bj.quantize(kernel, 2, 0), 2).kernel == "binary tensor cores, 2 x 2 planes"
        assert "expanded from 4 planes" in bj.explain(many, bj.quantize(kernel, 4, 0), 8).kernel
        explanation = bj.explain(few, bj.quantize(kernel, 4, 0), 8)
        assert explanation.kernel == "binary tensor cores, 8 x 4 planes, weights as rows"
        assert explanation.reason == "2 tokens: bound by reading the weights"


def test_tilings_that_do_not_fit_are_refused():
    for tiling, message in [
        (Tiling(96, 128), "tile_m must be 64 or 128"),
        (Tiling(128, 256), "does not fit a warpgroup's registers"),
        (Tiling(128, 192, slots=9), "bytes of shared memory"),
        (Tiling(64, 64, slots=1), "at least 2 slots"),
        (Tiling(128, 64, "split_m", slots=2, consumers=3), "at most 256 rows"),
        (Tiling(64, 64, "both"), "schedule must be one of split_m, split_n, alternate"),
        (Tiling(64, 64, cluster_m=4), "clusters have 1 or 2 blocks"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiling.check()
    with pytest.raises(ValueError, match="registers"):
        Tiling(128, 128).check(group_bytes=512)
    with pytest.raises(ValueError, match="2 or 3 consumers"):
        Tiling(64, 64, consumers=4).check()


def test_the_estimate_prefers_large_tiles_where_they_fill_the_chip():
    large = plan_product(8192, 8192, 8192, BipolarFormat(1), BipolarFormat(1)).tiling
    small = plan_product(512, 512, 8192, BipolarFormat(1), BipolarFormat(1)).tiling
    assert (large.tile_m, large.tile_n) == (128, 192)
    assert small.tile_m * small.tile_n < 128 * 128
    assert estimated_cycles(large, 8192, 8192, 8) < estimated_cycles(large, 8192, 8192, 16)


needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def compile_product(
    m, n, k, a_bits, w_bits, kind, tiling, dtype=jnp.bfloat16, group_size=None, offsets=False, residual=False
):
    a_format, w_format = BipolarFormat(a_bits), BipolarFormat(w_bits)
    recovery = Recovery(kind, a_format, w_format, k, with_zero=True)
    words = -(-k // 128) * 4 if kind == "planes" else -(-k // 32) * 8
    vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)  # noqa: E731
    if group_size is None:
        columns = ColumnTerms(
            *(vector(n, t) for t in (jnp.int32, jnp.float32, jnp.float32)), None, vector(n, "float32")
        )
        groups = None
    else:
        columns = ColumnTerms(scaled_value_sums=vector(n, jnp.float32), bias=vector(n, jnp.float32))
        groups = GroupTerms(
            *(
                jax.ShapeDtypeStruct((-(-k // group_size), size), jnp.float32)
                for size in ((n, n, m) if offsets else (n,))
            )
        )

    def product(x, w, tokens, columns, groups, residual):
        options = dict(group_size=group_size, group_terms=groups, residual=residual)
        return packed_matmul(x, w, tokens, columns, recovery, tiling, dtype, **options)

    _, report = sm90_compile.compile_for_h200(
        product,
        jax.ShapeDtypeStruct((a_bits if kind == "planes" else 1, m, words), jnp.uint32),
        jax.ShapeDtypeStruct((w_bits if kind == "planes" else 1, n, words), jnp.uint32),
        TokenTerms(vector(m, jnp.int32), vector(m, jnp.int32), vector(m, jnp.float32)),
        columns,
        groups,
        jax.ShapeDtypeStruct((m, n), dtype) if residual else None,
    )
    assert report.registers
    assert report.spill_bytes == 0
    assert not report.serialized_wgmma


@needs_compiler
@pytest.mark.parametrize("kind", ["planes", "int8"])
@pytest.mark.parametrize("tiling", CANDIDATES, ids=lambda t: f"{t.tile_m}x{t.tile_n}-{t.slots}")
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_candidates_compile_without_spills(tiling, kind, residual):
    compile_product(4096, 4096, 4096, 2, 2, kind, tiling, residual=residual)


@needs_compiler
@pytest.mark.parametrize(
    ("tiling", "group_size", "offsets"),
    [
        # Offsets and residuals need registers beside those of scales, which are compiled with half of the sizes.
        *itertools.product(GROUPED_CANDIDATES, (32, 64, 128, 512), (True,)),
        *itertools.product(GROUPED_CANDIDATES[::2], (32, 128), (False,)),
        *itertools.product(GROUPED_CANDIDATES[1::2], (64, 512), (False,)),
    ],
    ids=lambda value: f"{value.tile_m}x{value.tile_n}-{value.slots}" if isinstance(value, Tiling) else str(value),
)
def test_grouped_candidates_compile_without_spills(tiling, group_size, offsets):
    options = dict(group_size=group_size, offsets=offsets, residual=offsets)
    compile_product(4096, 4096, 4096, 8, 4, "int8", tiling, **options)


@needs_compiler
@pytest.mark.parametrize("schedule", ["split_m", "alternate"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_clusters_ragged_sizes_and_other_dtypes_compile(schedule, dtype):
    compile_product(37, 1001, 333, 1, 2, "planes", Tiling(64, 128, schedule, slots=4, cluster_m=2, cluster_n=2), dtype)


def table_entries() -> list[dict]:
    return load_table("NVIDIA H200")["entries"]


def test_the_planner_takes_measured_tilings_from_the_table(monkeypatch):
    monkeypatch.setattr(plan, "default_device", lambda: types.SimpleNamespace(device_kind="NVIDIA H200"))
    for entry in table_entries():
        Tiling(**entry["tiling"]).check()
        found = nearest_entry("NVIDIA H200", entry["kind"], entry["m"], entry["n"], entry["steps"])
        assert found == entry
    choice = plan_product(8192, 8192, 8192, BipolarFormat(1), BipolarFormat(2))
    assert choice.reason.startswith("measured at 8192x8192x8192 W")
    assert plan_product(8192, 8192, 8192, BipolarFormat(2), BipolarFormat(1)).tiling == choice.tiling
    assert plan_product(65, 64, 64, BipolarFormat(1), BipolarFormat(1)).reason == "estimated from tile sizes"
    assert nearest_entry("NVIDIA A100", "planes", 8192, 8192, 8) is None


def kernels_of_the_table() -> list[dict]:
    """The entries, but of those that differ in sizes and in the order of tiles alone only the first."""
    first = {}
    for entry in table_entries():
        tiling = Tiling(**entry["tiling"])
        ragged = entry["m"] % tiling.tile_m > 0, entry["n"] % tiling.tile_n > 0
        unordered = dataclasses.replace(tiling, band=1, band_axis="m")
        first.setdefault((entry["kind"], entry["shape"].split()[-1], unordered, ragged), entry)
    return list(first.values())


@needs_compiler
@pytest.mark.parametrize("entry", kernels_of_the_table(), ids=lambda entry: entry["shape"].replace(" ", "-"))
def test_the_shipped_table_compiles_without_spills(entry):
    *_, precision = entry["shape"].split()
    formats = bj.Precision.parse(precision)
    pairs = formats.w_bits * formats.a_bits if entry["kind"] == "planes" else 1
    elements_of_k = entry["steps"] // pairs * ELEMENTS_PER_ROW[entry["kind"]]
    compile_product(
        entry["m"], entry["n"], elements_of_k, formats.a_bits, formats.w_bits, entry["kind"], Tiling(**entry["tiling"])
    )


@needs_compiler
@pytest.mark.parametrize(("m", "n"), [(1, 30), (6, 24)])
def test_a_batch_of_weights_compiles(m, n, monkeypatch):
    """Mapped over, vectors become rows, whose strides TMA takes in 16 bytes only."""
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    w = jax.eval_shape(lambda k: bj.quantize(k, 2, -2), jax.ShapeDtypeStruct((3, 200, n), jnp.float32))

    def product(x, bias, w):
        return bj.matmul(x, w, 2, bias=bias, implementation="sm90")

    _, report = sm90_compile.compile_for_h200(
        product, jax.ShapeDtypeStruct((3, m, 200), jnp.bfloat16), jax.ShapeDtypeStruct((3, n), jnp.bfloat16), w
    )
    assert len(report.registers) == 2
    assert report.spill_bytes == 0
