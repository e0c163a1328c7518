"""config.json of Hugging Face directories: fields mean what transformers reads in them, or are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bipolar_jax.models.config import RopeScaling
from bipolar_jax.models.loaders.huggingface.config import read_config
from tests.support import tiny_checkpoints as tiny


def config_of(directory, **fields):
    """The config for a config.json with these fields."""
    (directory / "config.json").write_text(json.dumps(tiny.hf_config(tiny.make()) | fields))
    return read_config(directory)[1]


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FULL_TWICE = ["full_attention"] * 2
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE = {
    "nothing": ({}, None),
    "null": ({"rope_scaling": None}, None),
    "default": ({"rope_scaling": {"rope_type": "default"}}, None),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeScaling(kind="linear", factor=2.0)),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        RopeScaling("llama3", 8.0, original_context_length=64, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        RopeScaling("yarn", 4.0, original_context_length=32),
    ),
    "yarn, all fields": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2}},
        RopeScaling("yarn", 4.0, tiny.CONTEXT, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0),
    ),
    "yarn, two scales": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        RopeScaling("yarn", 4.0, tiny.CONTEXT, attention_factor=1.0),
    ),
}


@pytest.mark.parametrize("case", ROPE)
def test_rope_scaling_in_the_old_and_the_new_form(tmp_path, case):
    fields, expected = ROPE[case]
    old = config_of(tmp_path, rope_theta=5000.0, **fields)
    parameters = {"rope_type": "default", **(fields.get("rope_scaling") or {}), "rope_theta": 5000.0}
    parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    new = config_of(tmp_path, rope_theta=None, rope_parameters=parameters)
    assert old == new
    assert old.rope_scaling == expected
    assert old.rope_theta == 5000.0


def test_defaults_of_absent_fields(tmp_path):
    config = config_of(tmp_path, head_dim=None, num_key_value_heads=None, num_attention_heads=4, rope_theta=None)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (16, 4, 10000.0)


def test_token_ids(tmp_path):
    assert config_of(tmp_path, eos_token_id=7, bos_token_id=None).eos_ids == (7,)
    assert config_of(tmp_path, eos_token_id=[7, 8]).eos_ids == (7, 8)
    assert config_of(tmp_path, eos_token_id=None).eos_ids == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    config = config_of(tmp_path, eos_token_id=7, bos_token_id=2)
    assert (config.bos_id, config.eos_ids) == (2, (3, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2', supported are llama, mistral, mixtral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias true, which adds a bias to o_proj too"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, expected an integer"),
        ({"model_type": "qwen2", "max_window_layers": 1.5}, "max_window_layers is 1.5, expected an integer"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "layer_types": FULL_TWICE},
            "2 layer_types for 3 layers",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 2**31 - 1},
            "2147483647 layers, at most 65536 are plausible",
        ),
        ({"layer_types": ["chunked_attention"]}, "layer_types is"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\], supported are"),
        ({"model_type": {"a": 1}}, "model_type {'a': 1}, supported are"),
        ({"eos_token_id": True}, r"eos_token_id is \[True\], expected ids below"),
        ({"eos_token_id": 2.0}, r"eos_token_id is \[2.0\], expected ids below"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000000.*, expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000000.*, expected a positive number"),
        ({"hidden_size": 10**400}, "hidden_size is 1000000.*, expected an integer of at least 1 and at most"),
        ({"num_hidden_layers": 2**64 - 1}, "num_hidden_layers is 18446744073709551615, expected an integer"),
        ({"rope_theta": 1e-300}, "rope_theta must be from 1 to 1e.30"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "yarn RoPE scaling needs a rope_theta above 1"),
        ({"rope_scaling": YARN | {"beta_slow": 1e-308}}, "0 < beta_slow < beta_fast, from 1e-06 to 1e.06"),
        ({"rope_scaling": YARN | {"attention_factor": 1e300}}, "attention_factor must be above 0 and at most 1000"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 10**400}}, "original_max.* is 1000.*, expected"),
        ({"rope_scaling": {"factor": 4.0}}, "RoPE scaling without a rope_type, but with factor"),
        ({"rope_scaling": {"type": None, "factor": 4.0}}, "RoPE scaling without a rope_type, but with factor"),
        ({"rope_scaling": {"ropetype": "linear", "factor": 4.0}}, r"rope_scaling with unknown fields \['ropetype'\]"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}, "rope_type 'linear' and the type"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 4.0}}, r"RoPE scaling \['yarn'\], supported are"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            "both rope_scaling and rope_parameters, which differ",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5000.0}}},
            r"rope_parameters by type of layer \(full_attention\)",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic', supported are default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None, expected a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate false"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": [1]}, "rope_parameters is .*, expected an object"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        ({"hidden_size": None}, "hidden_size is None, expected an integer"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected an integer"),
        ({"num_key_value_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        ({"eos_token_id": 100000}, r"eos_token_id is \[100000\], expected ids below"),
        ({"eos_token_id": "x"}, "eos_token_id is"),
    ],
)
def test_unsupported_configs_are_rejected(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(tmp_path, **fields)
    assert str(caught.value).count(str(tmp_path / "config.json")) == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quantization_config": None}, {}),
        ({"quantization_config": {}}, {}),
        ({"hidden_act": "swish"}, {}),
        ({"model_type": "mistral", "sliding_window": 4096}, {}),
        ({"model_type": "mistral"}, {}),
        ({"model_type": "mistral", "sliding_window": 64}, {"window": 64}),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, {"context_length": 8192, "window": 4096}),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            {"qkv_bias": True, "window": 64, "window_layers": (2,)},
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
            {"qkv_bias": True, "window": 64},
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}
            | {"layer_types": [*FULL_TWICE, "sliding_attention"]},
            {"qkv_bias": True, "window": 64, "window_layers": (2,)},
        ),
        ({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 8192}, {"context_length": 8192}),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, {"qkv_bias": True}),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
            {"qkv_bias": True},
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 3,
            },
            {"qkv_bias": True},
        ),
        ({"rope_scaling": {"type": "default", "rope_type": "default"}}, {}),
        ({"rope_scaling": {}}, {}),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"type": "default"}}, {}),
        ({"rope_parameters": {"rope_theta": 5000.0}}, {"rope_theta": 5000.0}),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            {"rope_scaling": RopeScaling("yarn", 4.0, 64)},
        ),
        ({"max_position_embeddings": None}, {"context_length": 2048}),
        ({"model_type": "qwen2", "max_position_embeddings": None}, {"context_length": 32768, "qkv_bias": True}),
        ({"rope_scaling": YARN | {"finetuned": True}}, {"rope_scaling": RopeScaling("yarn", 4.0, 32)}),
        ({"num_attention_heads": 32, "num_key_value_heads": None}, {"num_heads": 32, "num_kv_heads": 32}),
    ],
)
def test_usable_configs_are_accepted(tmp_path, fields, expected):
    assert config_of(tmp_path, **fields) == dataclasses.replace(config_of(tmp_path), **expected)


@pytest.mark.parametrize(("model_type", "expected"), [("llama", 32), ("mistral", 8), ("qwen2", 32)])
def test_absent_key_heads_are_transformers_default(tmp_path, model_type, expected):
    fields = tiny.hf_config(tiny.make()) | {"model_type": model_type, "num_attention_heads": 32}
    del fields["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path)[1].num_kv_heads == expected


def test_json_of_other_encodings_and_depths(tmp_path):
    text = json.dumps(tiny.hf_config(tiny.make()))
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    read_config(tmp_path)
    for damaged in ('{"a":' + "[" * 100_000, "[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="config.json is damaged: .*download it again"):
            read_config(tmp_path)
