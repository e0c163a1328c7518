"""Which kernel a Hopper product gets, by estimate and by table; every one of them compiled for the chip."""

from __future__ import annotations

import dataclasses
import itertools
import re
import types

import jax
import jax.numpy as jnp
import pytest

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend import planning
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES, GROUPED_CANDIDATES, estimated_cycles, plan_product
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.sm90.core.wgmma import ELEMENTS_PER_ROW
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling, decode_tilings
from bipolar_jax.tuning.table import entries_of_kind, nearest_entry
from tests.support import sm90_compile

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def test_the_estimate_prefers_large_tiles_where_they_fill_the_chip():
    large = plan_product(8192, 8192, 8192, BipolarFormat(1), BipolarFormat(1)).tiling
    small = plan_product(512, 512, 8192, BipolarFormat(1), BipolarFormat(1)).tiling
    assert (large.tile_m, large.tile_n) == (128, 192)
    assert small.tile_m * small.tile_n < 128 * 128
    assert estimated_cycles(large, 8192, 8192, 8) < estimated_cycles(large, 8192, 8192, 16)


def test_few_tokens_of_many_planes_go_in_parts_where_that_reads_less():
    def chosen(m, w_bits, a_bits, n=4096):
        return plan_product(m, n, 4096, BipolarFormat(a_bits), BipolarFormat(w_bits))

    for w_bits in (2, 3, 4):
        choice = chosen(64, w_bits, 8)
        assert (choice.kind, choice.tiling.parts) == ("planes", 2)
        assert choice.reason == "64 tokens in 2 parts: estimated from bytes and planes"
    assert chosen(32, 2, 8).tiling.parts == chosen(64, 2, 4).tiling.parts == 1
    # Of many planes and columns bytes take fewer cycles, expansion and all.
    assert isinstance(chosen(64, 8, 8, 22016).tiling, Tiling)
    assert isinstance(chosen(65, 2, 8).tiling, Tiling)


def compile_product(
    m,
    n,
    k,
    a_bits,
    w_bits,
    kind,
    tiling,
    dtype=jnp.bfloat16,
    *,
    group_size=None,
    offsets=False,
    residual=False,
    activation=None,
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
        options = dict(group_size=group_size, group_terms=groups, residual=residual, activation=activation)
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
@pytest.mark.sample(1)
def test_candidates_compile_without_spills(tiling, kind, residual):
    compile_product(4096, 4096, 4096, 2, 2, kind, tiling, residual=residual)


@needs_compiler
@pytest.mark.parametrize("tiling", CANDIDATES, ids=lambda t: f"{t.tile_m}x{t.tile_n}-{t.slots}")
@pytest.mark.covered("spills without activations, by the test above; numbers, by `make gpu-test`")
def test_candidates_compile_with_activations(tiling):
    """One kind of operands is enough: the mainloop, where they differ, is the same."""
    compile_product(4096, 8192, 4096, 1, 2, "planes", tiling, activation=Activation("silu", gated=True))


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
@pytest.mark.sample(1)
def test_grouped_candidates_compile_without_spills(tiling, group_size, offsets):
    options = dict(group_size=group_size, offsets=offsets, residual=offsets)
    compile_product(4096, 4096, 4096, 8, 4, "int8", tiling, **options)


@needs_compiler
@pytest.mark.parametrize("schedule", ["split_m", "alternate"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.sample(1)
def test_clusters_ragged_sizes_and_other_dtypes_compile(schedule, dtype):
    compile_product(37, 1001, 333, 1, 2, "planes", Tiling(64, 128, schedule, slots=4, cluster_m=2, cluster_n=2), dtype)


def table_entries() -> list[dict]:
    """Of `packed_matmul`."""
    return [*entries_of_kind("NVIDIA H200", "planes"), *entries_of_kind("NVIDIA H200", "int8")]


def test_the_planner_takes_measured_tilings_from_the_table(monkeypatch):
    monkeypatch.setattr(planning, "default_device", lambda: types.SimpleNamespace(device_kind="NVIDIA H200"))
    for entry in table_entries():
        Tiling(**entry["tiling"]).check()
        found = nearest_entry("NVIDIA H200", entry["kind"], entry["m"], entry["n"], entry["steps"])
        assert found == entry
    choice = plan_product(8192, 8192, 8192, BipolarFormat(1), BipolarFormat(2))
    assert choice.reason.startswith("measured at 8192x8192x8192 W")
    assert plan_product(8192, 8192, 8192, BipolarFormat(2), BipolarFormat(1)).tiling == choice.tiling
    assert plan_product(65, 64, 64, BipolarFormat(1), BipolarFormat(1)).reason == "estimated from tile sizes"
    assert nearest_entry("NVIDIA A100", "planes", 8192, 8192, 8) is None


@pytest.mark.parametrize(
    ("device", "reason", "few_tiling"),
    [
        ("NVIDIA H100 80GB HBM3", "measured at llama2-7b/down@16 (16x4096x11008) W4A8", DecodeTiling(3, 4, 2)),
        ("NVIDIA H200", "16 tokens: bound by reading the weights", DecodeTiling(4, 4, 1)),
    ],
)
def test_an_h100_takes_what_was_measured_on_an_h200_but_not_the_other_way_round(
    device, reason, few_tiling, monkeypatch
):
    monkeypatch.setattr(planning, "default_device", lambda: types.SimpleNamespace(device_kind=device))
    assert plan_product(8192, 8192, 8192, BipolarFormat(1), BipolarFormat(2)).reason.startswith("measured at 8192x")
    few = plan_product(16, 4096, 11008, BipolarFormat(8), BipolarFormat(4))
    assert (few.reason, few.tiling) == (reason, few_tiling)


def test_every_tiling_of_few_tokens_in_the_table_is_one_that_fits():
    entries = entries_of_kind("NVIDIA H100 80GB HBM3", planning.FEW_TOKENS)
    assert len(entries) == 32
    for entry in entries:
        tokens, _, k = map(int, re.search(r"\((\d+)x(\d+)x(\d+)\)", entry["shape"]).groups())
        formats = bj.Precision.parse(entry["shape"].split()[-1])
        assert DecodeTiling(**entry["tiling"]) in decode_tilings(tokens, k, formats.a_bits, formats.w_bits)


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
@pytest.mark.sample(1)
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
@pytest.mark.sample(1)
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
