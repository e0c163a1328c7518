"""config.json of architectures after Llama: what the fields mean, in both layouts, and what is refused."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import safetensors.numpy

from bipolar_jax.models.config import RopeScaling
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.models.loaders.huggingface.config import read_config
from bipolar_jax.nn.compressible import layer_at
from tests.models.loaders import tiny_quantized as formats
from tests.models.loaders.golden import checkpoints

GOLDEN = checkpoints.read()


def config_of(directory, name, layout="4", without=(), **fields):
    """The config for the config.json of a golden checkpoint, with these fields, or without some."""
    values = GOLDEN[name].configs[layout] | fields
    (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in without}))
    return read_config(directory)[1]


@pytest.mark.parametrize("name", GOLDEN)
def test_both_layouts_are_one_config(tmp_path, name):
    assert config_of(tmp_path, name, "4") == config_of(tmp_path, name, "5")


def test_gemma_2_without_fields_has_those_of_the_2b_model(tmp_path):
    given = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    kept = {"model_type", *given}
    config = config_of(tmp_path, "gemma 2", without=set(GOLDEN["gemma 2"].configs["4"]) - kept, **given)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.context_length) == (8, 4, 256, 8192)
    assert (config.attention_softcap, config.logit_softcap, config.attention_scale) == (50.0, 30.0, 256**-0.5)
    assert (config.window, config.window_layers) == (4096, tuple(range(0, 26, 2)))
    assert (config.embed_scale, config.tie_embeddings, config.bos_id, config.eos_ids) == (48.0, True, 2, (1,))


def test_gemma_3_without_fields_has_full_attention_in_every_sixth_layer(tmp_path):
    absent = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq", "sliding_window")
    config = config_of(tmp_path, "gemma 3 1b", without=absent, num_hidden_layers=8)
    assert (config.window, config.window_layers) == (4096, (0, 1, 2, 3, 4, 6, 7))
    assert (config.rope_theta, config.window_rope_theta) == (1e6, 1e4)


def test_gemma_3_rope_by_type_of_layer(tmp_path):
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    new = {"full_attention": scaled, "sliding_attention": {"rope_type": "default"}}
    config = config_of(tmp_path, "gemma 3 4b", "5", rope_parameters=new)
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 8.0))
    assert config.window_rope_theta == 1e4
    without_windows = config_of(tmp_path, "gemma 3 4b", layer_types=["full_attention"] * 2)
    assert (without_windows.window, without_windows.window_rope_theta) == (None, None)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_all_names_of_phi_3s_scaling_are_longrope(tmp_path, kind):
    scaling = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "type": kind}
    config = config_of(tmp_path, "phi 3 mini 128k", rope_scaling=scaling)
    assert config.rope_scaling == RopeScaling("longrope", 4.0, 8, factors=(2.0,) * 6, short_factors=(1.0,) * 6)


def test_phi_3s_longrope_without_its_length_was_trained_with_4096_positions(tmp_path):
    config = config_of(tmp_path, "phi 3 mini 128k", without=("original_max_position_embeddings",))
    assert (config.rope_scaling.original_context_length, config.rope_scaling.factor) == (4096, 1.0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qwen3 0.6b", {"attention_bias": True}, "attention_bias true"),
        ("qwen3 0.6b", {"hidden_act": "gelu"}, "hidden_act 'gelu', supported is 'silu'"),
        ("gemma 2", {"attention_bias": True}, "attention_bias true"),
        ("gemma 2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu', supported is 'gelu_pytorch_tanh'"),
        ("gemma 2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0, expected a positive number"),
        ("gemma 2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1, expected a positive number"),
        ("gemma 3 1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention true"),
        ("gemma 3 1b", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0, expected an integer"),
        ("gemma 3 1b", {"rope_parameters": {"rope_theta": 1.0}}, r"rope_parameters with \['rope_theta'\], expected"),
        (
            "gemma 3 1b",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "scales the rotary frequencies of layers with a window",
        ),
        (
            "gemma 3 4b",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "both rope_scaling and rope_parameters",
        ),
        ("phi 4 mini", {"partial_rotary_factor": 0.4}, "rotary_dim must be even for rotary embeddings, got 3"),
        ("phi 4 mini", {"partial_rotary_factor": 1.5}, "partial_rotary_factor of 1.5"),
        ("phi 4 mini", {"partial_rotary_factor": 0.5}, "RoPE has 3 explicit factors; 4 rotated numbers"),
        ("phi 4 mini", {"rope_scaling": {"type": "longrope"}}, "long_factor is None, expected a list of numbers"),
        ("bitnet 2b", {"hidden_act": "silu"}, "hidden_act 'silu', supported is 'relu2'"),
    ],
)
def test_unsupported_configs_are_rejected(tmp_path, name, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(tmp_path, name, **fields)
    assert str(caught.value).count(str(tmp_path / "config.json")) == 1


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_folder_that_reads_images(tmp_path, prefix):
    golden = GOLDEN["gemma 3 4b"]
    config, weights = golden.configs["4"], checkpoints.make_weights(golden.configs["4"])
    checkpoints.write(tmp_path, config, weights, np.float32, 1)
    text = {name: value for name, value in config.items() if not name.endswith("token_id")}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "vocab_size": 7}
    whole |= {"bos_token_id": 2, "eos_token_id": [1, 7]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    renamed = {prefix + name.removeprefix("model."): array for name, array in weights.items()}
    tower = "vision_tower.x.weight" if prefix.startswith("language") else "model.vision_tower.x.weight"
    safetensors.numpy.save_file(renamed | {tower: np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    model = load_huggingface(tmp_path).model
    assert (model.config.bos_id, model.config.eos_ids) == (2, (1, 7))
    np.testing.assert_allclose(model(golden.ids), golden.logits, rtol=0, atol=5e-6 * np.abs(golden.logits).max())


def test_rows_of_joined_projections_must_be_those_of_the_config(tmp_path):
    config = GOLDEN["phi 4 mini"].configs["4"]
    weights = checkpoints.make_weights(config)
    name = "model.layers.1.mlp.gate_up_proj.weight"
    checkpoints.write(tmp_path, config, weights | {name: weights[name][1:]}, np.float32, 1)
    with pytest.raises(ValueError, match=r"gate_up_proj.weight' has shape \(79, 32\), its rows are not the \[40, 40\]"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("name", "quantization", "make"),
    [
        (
            "bitnet 2b",
            {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
            functools.partial(formats.bitnet, divides=False),
        ),
        (
            "phi 4 mini",
            {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False},
            functools.partial(formats.gptq, bits=4, group=8),
        ),
    ],
)
def test_packed_layers_are_the_float_model_of_their_weights(tmp_path, name, quantization, make):
    """BitNet 2B4T as it is published; and layers that lie side by side in a quantized tensor."""
    config, rng = GOLDEN[name].configs["4"], np.random.default_rng(0)
    weights, stored = checkpoints.make_weights(config), {}
    for tensor, array in list(weights.items()):
        if not tensor.endswith("_proj.weight"):
            stored[tensor] = array
            continue
        layer = make(rng, *array.shape)
        weights[tensor] = layer.weight
        parts = {f"{tensor.removesuffix('weight')}{suffix}": part for suffix, part in layer.tensors.items()}
        stored |= {part: np.ascontiguousarray(value) for part, value in parts.items()}
    directory = checkpoints.write(tmp_path / "low", config | {"quantization_config": quantization}, {}, np.float32, 1)
    safetensors.numpy.save_file(stored, directory / "model.safetensors")
    model = load_huggingface(directory, activations=16).model
    expected = load_huggingface(checkpoints.write(tmp_path / "float", config, weights, np.float32, 1)).model
    for path in ("attention/k_proj", "attention/v_proj", "ffn/gate_proj", "ffn/up_proj"):
        packed, exact = (layer_at(each.layers, path).kernel.get_value() for each in (model, expected))
        np.testing.assert_allclose(packed.dequantize(), exact, rtol=1e-6)
    ids, logits = GOLDEN[name].ids, expected(GOLDEN[name].ids)
    np.testing.assert_allclose(model(ids), logits, rtol=0, atol=2e-4 * np.abs(logits).max())
