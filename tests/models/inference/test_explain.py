"""Which kernels a model runs: the table names what execution chooses, and compiles and computes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.random_weights import random_float, random_packed
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops import dispatch

CONFIG = TransformerConfig(
    vocab_size=64,
    hidden_size=128,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    ffn_size=256,
    context_length=512,
)


def packed(precision: str, *, joined: bool = True, **changes):
    """Shapes of a packed model, of which no weight exists."""
    config = dataclasses.replace(CONFIG, **changes)
    options = {"dtype": jnp.bfloat16, "key": jax.random.key(0), "embed_bits": None}
    model = nnx.eval_shape(lambda: random_packed(config, bj.Precision.parse(precision), **options))
    return nnx.eval_shape(join_projections, model) if joined else model


def on_hopper(model, batch: int, length: int, **options):
    with interpreted(plgpu.InterpretGPUParams()):
        return bj.explain_model(model, batch, length, **options)


def names(steps) -> list[str]:
    return [step.name for step in steps]


def by(steps) -> dict[str, str]:
    return {step.name: step.runs.implementation for step in steps}


def test_a_joined_model_of_one_bit_runs_every_fused_kernel():
    found = on_hopper(packed("W1A1"), 1, 128)
    assert by(found.prefill) == {
        "qkv, rotation, cache write": "sm90",
        "attention": "xla",
        "o": "sm90",
        "gate/up, down": "sm90",
    }
    assert names(found.decode) == ["all layers, cache write"]
    assert "all 3 layers in one persistent kernel" in found.decode[0].runs.kernel
    assert found.not_one_kernel is None
    assert all(step.not_fused is None for step in (*found.prefill, *found.decode))
    assert (found.output.name, found.output.runs.kernel) == ("logits", "bfloat16 dot")


def test_two_sequences_decode_layer_by_layer():
    model = packed("W1A1")
    model.fused_sequences = 1
    found = on_hopper(model, 2, 128)
    assert found.not_one_kernel == "layers are one kernel for one sequence, not for 2"
    assert by(found.decode) == dict.fromkeys(
        ["qkv", "rotation, attention, cache write", "o", "gate/up", "down"], "sm90"
    )


def test_several_sequences_decode_in_one_kernel_where_the_model_asks_for_it():
    def prepared():
        config = dataclasses.replace(CONFIG, num_layers=1)
        model = random_packed(config, bj.Precision.parse("W4A8g64i"), key=jax.random.key(0), embed_bits=None)
        return prepare_for_inference(model, jnp.bfloat16, layout="tensor_cores", fused_sequences=3)

    model = nnx.eval_shape(prepared)
    found = on_hopper(model, 3, 128)
    assert names(found.decode) == ["all layers, cache write"]
    assert "3 sequences" in found.decode[0].runs.reason
    assert on_hopper(model, 4, 128).not_one_kernel == "layers are one kernel for up to 3 sequences, not for 4"


def test_prompts_of_long_float_groups_run_the_kernels_of_prepared_weights():
    def prepared():
        config = dataclasses.replace(CONFIG, hidden_size=256)  # two groups
        model = random_packed(config, bj.Precision.parse("W4A8g128f"), key=jax.random.key(0), embed_bits=None)
        return prepare_for_inference(model, jnp.bfloat16, layout="tensor_cores")

    steps = on_hopper(nnx.eval_shape(prepared), 1, 128).prefill
    assert names(steps) == ["qkv, rotation, cache write", "attention", "o", "gate/up", "down"]
    products = [step.runs.kernel for step in steps if step.name != "attention"]
    assert all("float groups of 128 expanded in registers" in kernel for kernel in products)


def test_an_unjoined_model_says_what_joining_would_give():
    found = on_hopper(packed("W4A8", joined=False), 1, 128)
    assert names(found.prefill) == ["q", "k", "v", "rotation, cache write", "attention", "o", "gate", "up", "down"]
    assert found.prefill[0].not_fused == "heads leave one product, of one packed layer"
    assert found.not_one_kernel == "the qkv projections must be one packed layer"
    assert "weights expanded from 4 planes" in found.prefill[0].runs.kernel
    assert "weights as rows" in found.decode[0].runs.kernel


def test_groups_and_a_quantized_cache_are_named_as_reasons():
    found = on_hopper(packed("W4A8g64f"), 1, 128, cache_bits=8)
    assert found.prefill[0].not_fused == "heads leave a product to a cache of floats"
    assert "gate/up" in names(found.prefill)
    assert "one scale a column" in found.not_one_kernel
    assert "8-bit cache" in next(step for step in found.decode if "attention" in step.name).runs.kernel


def test_few_tokens_have_no_heads_to_leave_and_no_signs():
    found = on_hopper(packed("W1A1"), 1, 32)
    assert "prompts of 32 tokens" in found.prefill[0].not_fused
    gates = next(step for step in found.prefill if step.name == "gate/up")
    assert gates.not_fused is None  # nothing to fuse: the quantizer of `down` computes the gates


@pytest.mark.parametrize("batch", [1, 2])
def test_a_float_model_is_left_to_xla_but_for_attention(batch):
    model = nnx.eval_shape(lambda: random_float(CONFIG, jnp.bfloat16, jax.random.key(0)))
    found = on_hopper(model, batch, 128)
    products = [step for step in (*found.prefill, *found.decode) if step.name in ("q", "k", "v", "o", "gate", "down")]
    assert {step.runs.kernel for step in products} == {"bfloat16 dot"}
    assert by(found.decode)["rotation, attention, cache write"] == "sm90"
    assert found.not_one_kernel is not None


def test_other_architectures_are_explained():
    bloom = packed("W2A2", positions="alibi", norm="layer", ffn="gelu", linear_bias=True, embed_norm=True)
    found = on_hopper(bloom, 2, 128)
    assert names(found.prefill) == ["qkv, cache write", "attention", "o", "up", "down"]
    assert names(found.decode) == ["qkv", "attention, cache write", "o", "up", "down"]


def test_rotations_at_run_time_are_steps_and_reasons():
    stream, ffn, keys = map(bj.ops.hadamard, (CONFIG.hidden_size, CONFIG.ffn_size, CONFIG.head_dim))
    folded = on_hopper(packed("W4A4", rotation=Rotation(stream)), 1, 128)
    assert names(folded.decode) == ["all layers, cache write"]
    full = on_hopper(packed("W4A4", rotation=Rotation(stream, ffn=ffn)), 1, 128)
    assert names(full.prefill)[-2:] == ["gate/up", "rotation, down"]
    assert names(full.decode) == ["all layers, cache write"]
    large = {"ffn_size": 384, "rotation": Rotation(stream, ffn=bj.ops.hadamard(384), keys=keys)}
    full = on_hopper(packed("W4A4", **large), 1, 128, cache_bits=4)
    assert names(full.prefill)[-3:] == names(full.decode)[-3:] == ["gate/up", "rotation", "down"]
    assert "the input of down is rotated in blocks of 384" in full.not_one_kernel
    assert by(full.decode)["rotation, attention, cache write"] == "sm90"
    only_keys = on_hopper(packed("W4A4", rotation=Rotation(keys=keys)), 1, 128, cache_bits=4)
    assert only_keys.not_one_kernel is None
    mlp = on_hopper(packed("W4A4", rotation=Rotation(ffn=ffn), ffn="relu", linear_bias=True), 2, 128)
    assert names(mlp.prefill)[-2:] == ["up", "rotation, down"]


def test_without_a_hopper_gpu_every_step_says_why():
    found = bj.explain_model(packed("W1A1"), 1, 128)
    assert {step.runs.implementation for step in (*found.prefill, *found.decode)} == {"xla"}
    text = str(found)
    assert "need an NVIDIA GPU of compute capability 9.0, not cpu" in text
    assert "not one kernel for all layers" in text


def test_the_table_has_a_line_for_each_step_and_each_reason():
    found = on_hopper(packed("W4A8", joined=False), 1, 128)
    lines = str(found).splitlines()
    assert lines[0] == "3 layers, batch 1, prompts of 128 tokens, cache of 192 positions in bfloat16, cpu"
    assert lines[1].split() == ["phase", "where", "step", "backend", "kernel", "(reason)"]
    steps = [line for line in lines[2:] if not line.startswith(" ")]
    assert len(steps) == len(found.prefill) + len(found.decode) + 2
    assert sum("layers 0-2" in line for line in steps) == len(found.prefill) + len(found.decode)
    assert "      not fused: heads leave one product, of one packed layer" in lines
    assert "      not one kernel for all layers: the qkv projections must be one packed layer" in lines


def test_nothing_runs(monkeypatch):
    """Only planners are called: every other function of a backend fails here."""

    class Planners:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            assert name.startswith("plan_"), name
            return getattr(self.backend, name)

    for name, backend in list(dispatch.BACKENDS.items()):
        monkeypatch.setitem(dispatch.BACKENDS, name, Planners(backend))
    for batch in (1, 2):
        on_hopper(packed("W1A1"), batch, 128)
        bj.explain_model(packed("W4A8"), batch, 128)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cache_bits must be 8 or 4"):
        bj.explain_model(packed("W1A1"), 1, 128, cache_bits=3)
    with pytest.raises(ValueError, match="at least 1 sequence of 1 token, got batch=1 and length=0"):
        bj.explain_model(packed("W1A1"), 1, 0)
