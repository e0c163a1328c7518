"""Layers in training pack the same bits on every backend, and by few kernels on Hopper."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.ops.pack_weights import pack_weights
from bipolar_jax.quantize.integer_scale_search import encode_integer_groups
from tests.support import sm90_compile

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]

needs_compiler = pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"w_bits": 4}, (100, 66)),
        ({"w_bits": 2, "group_size": 32, "calibration": "minmax", "scales": "float"}, (72, 10)),
        ({"w_bits": 3, "weight_norm": "center"}, (64, 10)),
        ({"w_bits": 8, "group_size": 48}, (96, 10)),  # XLA's
        ({"w_bits": 1, "calibration": "absmean"}, (2, 40, 6)),  # a batch
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [False, True], ids=["calibrated", "steps"])
@pytest.mark.sample(2)
def test_layers_pack_the_same_on_every_backend(options, shape, steps):
    if steps:  # which take no calibration
        options = {name: value for name, value in options.items() if name != "calibration"}
    w = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    layers = {name: bj.DotGeneral(a_bits=8, implementation=name, **options) for name in ("xla", "sm90")}
    step_size = layers["xla"].initial_step_size(w) if steps else None
    expected = layers["xla"].pack(w, step_size)
    with interpreted(plgpu.InterpretGPUParams()):
        packed = layers["sm90"].pack(w, step_size)
    assert jax.tree.structure(packed) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_integer_groups_pack_the_same_on_every_backend():
    w = jax.random.normal(jax.random.key(0), (72, 10))
    layer = bj.DotGeneral(4, 8, 32, scales="integer", implementation="xla")
    expected = layer.pack(w)
    with interpreted(plgpu.InterpretGPUParams()):
        packed = dataclasses.replace(layer, implementation="sm90").pack(w)
    jax.tree.map(np.testing.assert_array_equal, packed, expected)
    codes = encode_integer_groups(w.T, expected.format, expected.scale, expected.groups, 32)
    np.testing.assert_array_equal(expected.codes(), codes)
    np.testing.assert_array_equal(expected.row_sums, expected.signed_rows().sum(-1, dtype=jnp.int32, keepdims=True))


@needs_compiler
@pytest.mark.parametrize(
    "options", [{"w_bits": 8}, {"w_bits": 4, "group_size": 64, "calibration": "minmax", "scales": "float"}], ids=str
)
def test_a_matrix_takes_few_kernels(options, monkeypatch):
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    layer = bj.DotGeneral(a_bits=8, implementation="sm90", **options)
    compiled, report = sm90_compile.compile_for_h200(
        lambda w: layer.pack(w), jax.ShapeDtypeStruct((2048, 8192), jnp.bfloat16)
    )
    assert len(report.registers) == 1
    text = compiled.as_text()
    kernels = re.findall(r" (?:fusion|custom-call|reduce|copy|transpose)\(", text[text.index("ENTRY") :])
    # Extremes, scales, planes and parts of sums, row sums; with groups one more for their layout.
    assert len(kernels) <= 4 + ("group_size" in options)


def test_weights_for_one_product_stay_unpacked_on_cpus():
    w = jax.random.normal(jax.random.key(0), (2, 72, 10))
    expected = bj.quantize(w, 4, -2, 32, scales="float")
    numbers = (expected.format, expected.scale, expected.offset, 32)
    found = pack_weights(w, *numbers, for_one_product=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected.unpack())
    with interpreted(plgpu.InterpretGPUParams()):
        packed = jax.eval_shape(lambda w: pack_weights(w, *numbers, for_one_product=True), w)
    assert isinstance(packed, bj.BipolarArray)


def test_on_a_cpu_beside_the_gpu_xla_packs(monkeypatch):
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    w = jax.random.normal(jax.random.key(0), (70, 5))
    packed = bj.DotGeneral(5, 8, implementation="sm90").pack(w)
    np.testing.assert_array_equal(packed.planes, bj.quantize(w, 5, -2).planes)


@needs_compiler
def test_layers_of_the_same_input_quantize_it_once(monkeypatch):
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    layer = bj.DotGeneral(2, 2, implementation="sm90")

    def forward(x, gate, up):
        return [layer(x, w, (((1,), (0,)), ((), ()))) for w in (gate, up)]

    w = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    compiled, report = sm90_compile.compile_for_h200(forward, jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16), w, w)
    assert report.spill_bytes == 0
    # Each packs and multiplies; one quantizes.
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 5
