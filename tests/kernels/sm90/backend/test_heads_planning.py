"""Which tiles a product of prompts' heads gets, and every one of them compiled for the chip."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend import planning
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES, MOST_HEAD_COLUMNS, plan_heads, with_staging
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.projections.prompt_projection import HEAD_SIZES, project_heads
from bipolar_jax.tuning.table import entries_of_kind
from tests.support import sm90_compile

ONE_BIT = BipolarFormat(1)

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


def test_tiles_are_whole_heads():
    for batch, length, heads, head_dim in [(1, 1024, 96, 128), (1, 100, 15, 64), (8, 300, 48, 128), (4, 64, 15, 64)]:
        choice = plan_heads(batch, length, heads * head_dim, 4096, head_dim, ONE_BIT, ONE_BIT)
        assert choice.tiling.tile_n in (head_dim, 128)
        assert choice.tiling.cluster_size == 1
        assert choice.kind == "planes"
    with pytest.raises(NotImplementedError, match="64 tokens are too few"):
        plan_heads(1, 64, 96 * 128, 4096, 128, ONE_BIT, ONE_BIT)


def test_measured_tiles_are_taken_if_they_are_heads(monkeypatch):
    monkeypatch.setattr(planning, "default_device", lambda: types.SimpleNamespace(device_kind="NVIDIA H200"))
    narrow = plan_heads(1, 2048, 4096, 4096, 128, ONE_BIT, ONE_BIT)
    assert narrow.reason == "measured at llama2-7b/o@2048 (2048x4096x4096) W1A1"
    wide = plan_heads(1, 2048, 12288, 4096, 128, ONE_BIT, ONE_BIT)
    assert wide.tiling.tile_n == 128
    assert "hold heads of 128" in wide.reason


def kernels() -> list[tuple[Tiling, int]]:
    """Tilings that the planner can choose, with the sizes of heads; of those that differ in order alone the first."""
    measured = [
        Tiling(**entry["tiling"]) for kind in ("planes", "int8") for entry in entries_of_kind("NVIDIA H200", kind)
    ]
    able = [
        (dataclasses.replace(with_staging(tiling), band=1, band_axis="m"), size)
        for tiling in (*CANDIDATES, *measured)
        for size in HEAD_SIZES
        if tiling.tile_n <= MOST_HEAD_COLUMNS and tiling.tile_n % size == 0 and tiling.cluster_size == 1
    ]
    return list(dict.fromkeys(able))


def compile_heads(tiling, size, kind, *, batch=2, length=1000, capacity=1100, rope=True, dtype=jnp.bfloat16):
    """Of prompts that leave rows of tiles empty, with offsets and a bias: what takes the most registers."""
    layout, k = HeadLayout(8, 2, size, capacity), 4096
    m, n = batch * length, layout.columns
    words = -(-k // 128) * 4 if kind == "planes" else -(-k // 32) * 8
    recovery = Recovery(kind, BipolarFormat(2), BipolarFormat(2), k, with_zero=True)
    vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)  # noqa: E731
    cache = jax.ShapeDtypeStruct((2, batch, layout.keys, capacity, size), dtype)

    def project(x, w, tokens, columns, keys, values, layer, tables):
        options = dict(length=length)
        return project_heads(x, w, tokens, columns, recovery, tiling, layout, keys, values, layer, tables, **options)

    planes = 2 if kind == "planes" else 1
    _, report = sm90_compile.compile_for_h200(
        project,
        jax.ShapeDtypeStruct((planes, m, words), jnp.uint32),
        jax.ShapeDtypeStruct((planes, n, words), jnp.uint32),
        TokenTerms(vector(m, jnp.int32), vector(m, jnp.int32), vector(m, jnp.float32)),
        ColumnTerms(*(vector(n, t) for t in (jnp.int32, jnp.float32, jnp.float32)), None, vector(n, jnp.float32)),
        cache,
        cache,
        jax.ShapeDtypeStruct((), jnp.int32),
        (jax.ShapeDtypeStruct((length, size // 2), jnp.int16),) * 2 if rope else None,
    )
    assert report.registers
    assert report.spill_bytes == 0
    assert not report.serialized_wgmma


@needs_compiler
@pytest.mark.parametrize(
    ("tiling", "size"), kernels(), ids=lambda x: f"{x.tile_m}x{x.tile_n}-{x.slots}" if isinstance(x, Tiling) else str(x)
)
@pytest.mark.sample(1)
def test_every_tiling_compiles_without_spills(tiling, size):
    compile_heads(tiling, size, "planes")


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [{"kind": "int8"}, {"kind": "int8", "rope": False}, {"kind": "planes", "dtype": jnp.float16, "length": 1024}],
    ids=str,
)
@pytest.mark.covered("the epilogue, by the test above; bytes, by test_planning.py and `make gpu-test`")
def test_other_operands_compile_without_spills(options):
    compile_heads(with_staging(CANDIDATES[1]), 128, **options)


def test_all_of_a_tile_has_a_place_to_leave_by():
    assert with_staging(CANDIDATES[1]) == dataclasses.replace(CANDIDATES[1], slots=4)
    for tiling in CANDIDATES:
        pieces = tiling.tile_m * tiling.tile_n // (64 * 64)
        assert with_staging(tiling).staging_slots() == pieces
