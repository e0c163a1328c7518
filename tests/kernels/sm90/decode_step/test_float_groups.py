"""The decode step on prepared weights whose groups have float scales: interpreted, simulated, compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.decode_step.float_sums import row_sums, scaled_products
from bipolar_jax.kernels.sm90.prepared_weights.expansion import Expansion
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.packing.float_terms import terms_shape
from tests.kernels.sm90.decode_step.layers_twin import check_layers, compiled, preset_case
from tests.kernels.sm90.decode_step.test_prepared_step import PREPARED, planned
from tests.kernels.sm90.decode_step.test_prepared_threads import stored_token
from tests.packing.float_groups import float_groups, numbers_of
from tests.support import sm90_compile, warpgroup_simulator

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

A8 = BipolarFormat(8)
FLOATS = dataclasses.replace(PREPARED, scales="float")


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        # Float32 offsets, a block of several parts, more loads than slots.
        (dataclasses.replace(FLOATS, hidden=256, ffn=256, heads=2, calibration="minmax", group_size=128), 3),
        # Warps that take turns; the order of floats; no offsets.
        (
            dataclasses.replace(
                FLOATS, w_bits=6, a_bits=4, group_size=16, norm=LayerNorm, activation=Activation("gelu")
            ),
            2,
        ),
        # Heads of 64; K that ends within a stage and a group.
        (
            dataclasses.replace(
                FLOATS, hidden=192, ffn=320, heads=3, head_dim=64, calibration="minmax", group_size=128
            ),
            3,
        ),
    ],
    ids=["W4A8g128f", "W6A4g16f", "ragged"],
)
@pytest.mark.covered("the phases, by test_heads_of_64.py; threads, below; the kernel, by `make gpu-test`")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "stages"),
    [
        ("scales", 4, 128, 4),
        ("zeros", 2, 32, 4),
        ("minimums", 4, 32, 4),
        ("offsets", 8, 64, 2),
        ("offsets", 3, 16, 4),
        ("block_scales", 6, 16, 2),
        ("block_minimums", 4, 32, 4),
        ("block_nibbles", 2, 16, 4),
    ],
)
def test_stages_are_multiplied(kind, bits, group_size, stages, monkeypatch):
    """All loads of a slice, some codes at their limits: sums of chunks are exact, so that only scaling rounds."""
    fmt = BipolarFormat(bits)
    w = float_groups(fmt, 128, 1024, group_size, kind)
    prepared, part = w.prepare(), 2
    words, terms = (np.array(array)[0, part] for array in (prepared.words, prepared.terms))
    codes = np.random.default_rng(bits).integers(0, 256, 1024)
    codes[:256] = 0
    warpgroup_simulator.install(monkeypatch)
    token = stored_token(codes, A8, prepared.order)
    expansion = scaled_products.ScaledExpansion(Expansion(bits, prepared.chunks), fmt, kind)
    warpgroup_simulator.bank_conflicts[0] = 0
    total = [np.zeros(128, np.float32)] * 4
    for load in range(8 // stages):
        mine = slice(load * stages, (load + 1) * stages)
        arrays = [np.ascontiguousarray(array) for array in (words[mine], token, terms[mine])]
        assert arrays[2].shape[1:] == terms_shape(kind, prepared.chunks)
        pointers = [ptx.pointer(array, ptx.SHARED) for array in arrays]
        for valid in (0, 1):  # 0 adds nothing
            options = (ptx.int32(load), [ptx.int32(valid)], stages, expansion)
            total = scaled_products.add_scaled_stages_of_warp(total, pointers, *options)
    sums = np.full((4, 4, 130), np.nan, np.float32)
    sums[1:] = 0
    own = ptx.pointer(sums[0], ptx.SHARED)
    row_sums.store_sums_of_warp(own, total, ptx.int32(2), 64, 130)
    assert warpgroup_simulator.bank_conflicts[0] == 0
    thread = ptx.thread_in_warpgroup()
    found = row_sums.take_of_thread(ptx.pointer(sums, ptx.SHARED), thread, ptx.int32(2), 80, 130)
    assert not found[80:].any()
    numbers = (numbers_of(w) / np.asarray(prepared.scale))[
        np.concatenate([16 * part + np.arange(16), 64 + 16 * part + np.arange(16)])
    ]
    expected, bound = numbers @ (codes - 128.0), 80 * 2.0**-24 * (np.abs(numbers) @ np.abs(codes - 128.0))
    assert np.all(np.abs(found[[*range(16), *range(64, 80)]] - expected) <= bound)


@pytest.mark.parametrize(
    ("name", "precision", "group_size", "calibration", "cache_bits"),
    [
        ("llama-3-8b", (4, 8), 128, "minmax", None),
        ("llama-3-8b", (4, 8), 128, "mse", 8),
        ("llama-3-8b", (4, 8), 32, "minmax", None),
        ("qwen2.5-7b", (8, 8), 128, "mse", None),
        ("opt-6.7b", (6, 8), 16, "minmax", 4),
    ],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.covered("spills of prepared steps, by test_prepared_step.py; numbers of all kinds, by `make gpu-test`")
def test_compiles_without_spills(name, precision, group_size, calibration, cache_bits):
    fields = {"cache_bits": cache_bits, "prepared": True, "group_size": group_size, "scales": "float"}
    case = preset_case(name, *precision, calibration=calibration, **fields)
    assert compiled(case).stack_bytes == 0


def test_the_plan_says_how_groups_are_scaled():
    assert planned(FLOATS).endswith("prepared weights of 4 bits, groups of 64 with float scales")
    offsets = dataclasses.replace(FLOATS, calibration="minmax")
    assert planned(offsets).endswith("with float offsets")
    with pytest.raises(NotImplementedError, match="groups of one size: down is PreparedArray"):
        planned(FLOATS, down=offsets)


@pytest.mark.parametrize("name", ["llama-3-8b", "smollm2-135m"])
@pytest.mark.sample(1)
def test_models_decode_in_one_kernel(name):
    def model():
        precision = bj.Precision.parse("W4A8g128f")
        random = random_packed(preset(name), precision, dtype=jnp.bfloat16, key=jax.random.key(0), embed_bits=None)
        return prepare_for_inference(random, jnp.bfloat16)

    with interpreted(plgpu.InterpretGPUParams()):
        found = bj.explain_model(nnx.eval_shape(model), 1, 512)
    assert found.not_one_kernel is None
    assert "groups of 128 with float offsets" in found.decode[0].runs.kernel
