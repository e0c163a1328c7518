"""The decode step with tokens of 16-bit floats: interpreted, simulated, compiled."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.decode_step.float_sums import (
    float_products,
    float_token,
    row_sums,
    scaled_float_products,
)
from bipolar_jax.kernels.sm90.prepared_weights.centred_floats import CentredExpansion
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.models.inference.explain import explain_model
from bipolar_jax.models.inference.prepare import prepare_for_inference
from tests.kernels.sm90.decode_step.layers_twin import check_layers, compiled, preset_case
from tests.kernels.sm90.decode_step.test_decode_step import small_model
from tests.kernels.sm90.decode_step.test_prepared_step import PREPARED, planned
from tests.packing.float_groups import float_groups, numbers_of
from tests.packing.integer_groups import array_of_codes, array_of_groups, random_groups
from tests.support import sm90_compile, warpgroup_simulator
from tests.support.integer_products import random_codes

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

FLOAT = dataclasses.replace(PREPARED, a_bits=None)
ROTATED = Activation("silu", True, hadamard(320, block=16))


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        # Parts that are more than one block's, gates that end within a vector, biases.
        (dataclasses.replace(FLOAT, ffn=320, group_size=128, bias=True, activation=ROTATED), 3),
        # The order of floats, a norm that subtracts the mean, K slices of other warpgroups that end within a stage.
        (
            dataclasses.replace(
                FLOAT, w_bits=3, ffn=1152 + 64, group_size=16, norm=LayerNorm, activation=Activation("gelu")
            ),
            2,
        ),
        # Warps that take turns, and no groups.
        (dataclasses.replace(FLOAT, w_bits=8, group_size=None), 2),
        # Float scales of groups, with offsets.
        (
            dataclasses.replace(
                FLOAT, hidden=256, ffn=256, heads=2, scales="float", calibration="minmax", group_size=128
            ),
            3,
        ),
    ],
    ids=["W4A16g128", "W3A16g16", "W8A16", "W4A16g128f"],
)
@pytest.mark.covered("the phases, by test_heads_of_64.py; threads, below; the kernel, by `make gpu-test`")
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


@pytest.mark.parametrize(
    ("bits", "group_size", "stages", "dtype"),
    [
        (4, 128, 4, ml_dtypes.bfloat16),
        (6, 16, 2, ml_dtypes.bfloat16),
        (8, None, 2, np.float16),
        (1, 32, 4, ml_dtypes.bfloat16),
    ],
)
def test_stages_are_multiplied(bits, group_size, stages, dtype, monkeypatch):
    """From a token of small integers in registers to sums of rows: all is exact."""
    fmt, part, name = BipolarFormat(bits), 2, PTX_TYPES[np.dtype(dtype).name]
    ones = np.ones(128, np.float32)
    if group_size is None:
        codes = random_codes(fmt, 128, 1024, 0)
        w, values = array_of_codes(codes, fmt, ones), 2 * codes.astype(np.int64) - fmt.max_value
    else:
        groups = random_groups(fmt, 128, 1024, group_size)
        w, values = array_of_groups(groups, fmt, ones), groups.values
    prepared = w.prepare()
    words, terms = (None if a is None else np.array(a)[0, part] for a in (prepared.words, prepared.terms))
    x = np.random.default_rng(bits).integers(-8, 9, 1024)
    expected_words = float_token.float_words_of(jnp.asarray(x.astype(dtype)), prepared.order)
    back = float_token.float_positions_of(expected_words, name)
    assert back.shape == (8, 128)
    assert back.dtype == dtype
    expected_words = np.asarray(expected_words)
    warpgroup_simulator.install(monkeypatch)
    thread = ptx.thread_in_warpgroup()
    token = np.zeros(float_token.FLOAT_SLICE_WORDS, np.uint32)
    store = float_token.STORES[prepared.order]
    pairs = float_token.rounded_pairs(name, list(x.reshape(128, 8).T.astype(np.float32)))
    for stored in (0, 1):
        assert not token.any()
        store(ptx.pointer(token, ptx.SHARED), thread, pairs, ptx.equal(ptx.int32(stored), 1))
    np.testing.assert_array_equal(token, expected_words)
    expansion = FloatExpansion(fmt, prepared.chunks, FLOATS[name])
    warpgroup_simulator.bank_conflicts[0] = 0
    total = [np.zeros(128, np.float32)] * 4
    for load in range(8 // stages):
        mine = slice(load * stages, (load + 1) * stages)
        arrays = [words[mine], token] if terms is None else [words[mine], token, terms[mine]]
        pointers = [ptx.pointer(np.ascontiguousarray(array), ptx.SHARED) for array in arrays]
        for valid in (0, 1):  # 0 adds nothing
            options = (ptx.int32(load), [ptx.int32(valid)], stages, expansion)
            total = float_products.add_float_stages_of_warp(total, pointers, *options)
    assert warpgroup_simulator.bank_conflicts[0] == 0
    sums = np.zeros((4, 4, 130), np.float32)
    row_sums.store_sums_of_warp(ptx.pointer(sums[0], ptx.SHARED), total, ptx.int32(2), 64, 130)
    found = row_sums.take_of_thread(ptx.pointer(sums, ptx.SHARED), thread, ptx.int32(2), 80, 130)
    rows = np.concatenate([16 * part + np.arange(16), 64 + 16 * part + np.arange(16)])
    np.testing.assert_array_equal(found[[*range(16), *range(64, 80)]] / expansion.unit, values[rows] @ x)


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "stages", "dtype"),
    [
        ("scales", 4, 128, 4, ml_dtypes.bfloat16),
        ("zeros", 8, 64, 2, ml_dtypes.bfloat16),
        ("minimums", 4, 32, 4, np.float16),
        ("offsets", 3, 16, 4, ml_dtypes.bfloat16),
        ("block_scales", 6, 16, 2, np.float16),
        ("block_minimums", 4, 32, 4, ml_dtypes.bfloat16),
    ],
)
def test_sums_of_chunks_are_scaled(kind, bits, group_size, stages, dtype, monkeypatch):
    """A token of small integers, some codes at their limits: sums of chunks are exact, so that only scaling rounds."""
    fmt, part, name = BipolarFormat(bits), 2, PTX_TYPES[np.dtype(dtype).name]
    w = float_groups(fmt, 128, 1024, group_size, kind)
    prepared = w.prepare()
    words, terms = (np.array(array)[0, part] for array in (prepared.words, prepared.terms))
    x = np.random.default_rng(bits).integers(-8, 9, 1024)
    x[:128] = 8
    token = np.asarray(float_token.float_words_of(jnp.asarray(x.astype(dtype)), prepared.order))
    warpgroup_simulator.install(monkeypatch)
    expansion = CentredExpansion(fmt, prepared.chunks, FLOATS[name], kind)
    warpgroup_simulator.bank_conflicts[0] = 0
    total = [np.zeros(128, np.float32)] * 4
    for load in range(8 // stages):
        mine = slice(load * stages, (load + 1) * stages)
        arrays = [np.ascontiguousarray(array) for array in (words[mine], token, terms[mine])]
        pointers = [ptx.pointer(array, ptx.SHARED) for array in arrays]
        for valid in (0, 1):  # 0 adds nothing
            options = (ptx.int32(load), [ptx.int32(valid)], stages, expansion)
            total = scaled_float_products.add_scaled_float_stages_of_warp(total, pointers, *options)
    assert warpgroup_simulator.bank_conflicts[0] == 0
    sums = np.zeros((4, 4, 130), np.float32)
    row_sums.store_sums_of_warp(ptx.pointer(sums[0], ptx.SHARED), total, ptx.int32(2), 64, 130)
    found = row_sums.take_of_thread(ptx.pointer(sums, ptx.SHARED), ptx.thread_in_warpgroup(), ptx.int32(2), 80, 130)
    numbers = numbers_of(w)[np.concatenate([16 * part + np.arange(16), 64 + 16 * part + np.arange(16)])]
    bound = 80 * 2.0**-24 * (np.abs(numbers) @ np.abs(x))
    assert np.all(np.abs(found[[*range(16), *range(64, 80)]] / expansion.unit - numbers @ x) <= bound)


@pytest.mark.parametrize(
    ("name", "w_bits", "group_size", "cache_bits", "fields"),
    [
        ("llama-3-8b", 4, 128, None, {}),
        ("llama-3-8b", 2, 64, 8, {}),
        ("qwen2.5-7b", 6, 16, 4, {}),
        ("opt-6.7b", 3, 32, None, {}),
        ("llama-3-8b", 4, 128, None, {"scales": "float"}),
        ("llama-3-8b", 5, 32, None, {"scales": "float", "calibration": "minmax"}),
        ("opt-6.7b", 6, 16, 4, {"scales": "float", "calibration": "minmax"}),
    ],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.covered("spills of prepared steps, by test_prepared_step.py; numbers of all kinds, by `make gpu-test`")
def test_compiles_without_spills(name, w_bits, group_size, cache_bits, fields):
    fields = {"cache_bits": cache_bits, "prepared": True, "group_size": group_size, **fields}
    assert compiled(preset_case(name, w_bits, None, **fields)).stack_bytes == 0


def test_the_plan_says_that_tokens_are_floats():
    assert planned(FLOAT).endswith("prepared weights of 4 bits, groups of 64, float tokens")
    with pytest.raises(NotImplementedError, match="prepared weights that have groups, or no offsets: qkv is"):
        planned(dataclasses.replace(FLOAT, prepared=False, group_size=None))
    floats = planned(dataclasses.replace(FLOAT, scales="float"))
    assert floats.endswith("groups of 64 with float scales, float tokens")


@pytest.mark.parametrize(
    ("precision", "layout"), [("W4A16g64", None), ("W3A16g16", None), ("W4A16g32f", "tensor_cores")]
)
def test_models_of_float_activations_decode_in_one_kernel(precision, layout):
    with interpreted(plgpu.InterpretGPUParams()):
        model = nnx.eval_shape(lambda: prepare_for_inference(small_model(precision), layout=layout))
        explained = explain_model(model, 1, 64)
    assert explained.not_one_kernel is None
    (step,) = explained.decode
    assert "in one persistent kernel" in step.runs.kernel
    assert step.runs.kernel.endswith(", float tokens")
    products = [step.runs.kernel for step in explained.prefill if step.name in ("qkv", "o", "gate/up", "down")]
    assert len(products) == 4
    assert all("bfloat16 tensor cores, weights of" in kernel for kernel in products)
