"""The decode step of small models, with heads of 64 and sizes that end within a tile: interpreted and compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.semantics.hadamard import hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import Product
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_packed
from tests.kernels.sm90.decode_step.layers_twin import Case, check_layers, compiled, preset_case
from tests.support import sm90_compile

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("clean_interpreter")]

# Sizes of one tile and a half, and of two and a half; three query heads for one of keys.
PREPARED = Case(1, 192, 320, 3, 1, 4, 8, 128, 100, prepared=True, group_size=64, head_dim=64, spans=(0.9, 1, 0.85, 0.8))
PLANES = dataclasses.replace(PREPARED, w_bits=2, prepared=False, group_size=None)


def rotated(case: Case, block: int, function: str = "silu", gated: bool = True) -> Case:
    """The input of down is rotated."""
    return dataclasses.replace(case, activation=Activation(function, gated, hadamard(case.ffn, block=block)))


ROTATED = rotated(dataclasses.replace(PREPARED, ffn=192), 64)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        # A group that ends with K and not with its stage. Blocks make 64 numbers of the input of down, and rotate all.
        (dataclasses.replace(ROTATED, group_size=128, calibration="minmax", bias=True), 3),
        # Two layers, of which the second's rows begin within a tile. Blocks make 48 numbers and rotate 16, every block
        # the rest.
        (dataclasses.replace(ROTATED, layers=2, group_size=128, calibration="minmax", bias=True), 4),
        (dataclasses.replace(ROTATED, w_bits=1, cache_bits=8), 3),
        (rotated(dataclasses.replace(PREPARED, ffn=256, cache_bits=8, symmetric=True), 256), 7),
        # Rows in the order of parts: runs of 16 stay together.
        (rotated(dataclasses.replace(PREPARED, w_bits=8, group_size=None, bias=True), 16, "gelu", gated=False), 3),
        (rotated(dataclasses.replace(PREPARED, w_bits=8, group_size=None), 32, "gelu", gated=False), 3),
        # Of planes 128 and 96 rows a block.
        (rotated(dataclasses.replace(PLANES, layers=2, bias=True), 32), 3),
        (rotated(dataclasses.replace(PLANES, ffn=256), 256), 3),
        (dataclasses.replace(PLANES, cache_bits=4, norm=LayerNorm, positions="alibi", rotates_keys=True), 4),
    ],
    ids=lambda value: (
        f"W{value.w_bits}g{value.group_size}, cache {value.cache_bits}, rotated by {value.rotated_by}"
        if isinstance(value, Case)
        else f"{value}"
    ),
)
@pytest.mark.sample(1)
def test_layers_are_the_twins(case, blocks):
    check_layers(case, blocks)


@pytest.mark.parametrize(
    ("ffn", "halves", "prepared", "kept"),
    [
        (14336, 2, True, 16),  # 112 rows a block
        (14336, 2, False, 128),  # 128 rows
        (8192, 2, True, 64),  # 64 rows
        (11008, 2, True, 32),  # 96 rows
        (14336, 1, True, 16),  # 128 rows in the order of parts
    ],
)
def test_runs_that_blocks_keep_whole(ffn, halves, prepared, kept):
    up = Product(halves * ffn, 4096, halves, 132, prepared)
    assert max(run for run in (2**i for i in range(9)) if up.keeps_whole(run)) == kept
    if prepared:
        assert bj.ops.decode_rotation_block(ffn, gated=halves == 2) == kept


@pytest.mark.parametrize(
    ("name", "w_bits", "group_size", "cache_bits", "prepared"),
    [
        ("smollm2-135m", 4, 128, None, True),
        ("smollm2-1.7b", 4, 64, 8, True),
        ("qwen2.5-0.5b", 8, None, 4, True),
        ("smollm2-135m", 2, None, None, False),
        ("smollm2-1.7b", 4, None, 4, False),
    ],
)
@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.covered("spills of prepared steps, by test_prepared_step.py; numbers of all kinds, by `make gpu-test`")
def test_compiles_without_spills(name, w_bits, group_size, cache_bits, prepared):
    fields = {"cache_bits": cache_bits, "prepared": prepared, "group_size": group_size}
    report = compiled(preset_case(name, w_bits, 8, **fields))
    assert report.stack_bytes == 0
    assert not report.serialized_wgmma


@pytest.mark.parametrize("precision", ["W4A8g128i", "W8A8", "W2A8"])
@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b", "qwen2.5-0.5b"])
@pytest.mark.sample(2)
def test_small_models_decode_in_one_kernel(name, precision):
    def model():
        random = random_packed(
            preset(name), bj.Precision.parse(precision), dtype=jnp.bfloat16, key=jax.random.key(0), embed_bits=None
        )
        if precision == "W2A8":
            return join_projections(random)
        return prepare_for_inference(random, jnp.bfloat16, layout="tensor_cores")

    with interpreted(plgpu.InterpretGPUParams()):
        found = bj.explain_model(nnx.eval_shape(model), 1, 512)
    assert found.not_one_kernel is None
    assert f"all {preset(name).num_layers} layers in one persistent kernel" in found.decode[0].runs.kernel
