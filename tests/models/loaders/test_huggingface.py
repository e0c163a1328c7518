"""Hugging Face directories: weights, configs, and errors for damaged files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from bipolar_jax.models.config import RopeScaling
from bipolar_jax.models.loaders import load_huggingface, load_pretrained
from bipolar_jax.models.loaders.huggingface.config import read_config
from tests.support import tiny_checkpoints as tiny


def parameters(model) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def checkpoint() -> tiny.Tiny:
    return tiny.make()


@pytest.fixture
def directory(checkpoint, tmp_path):
    return tiny.write_huggingface(checkpoint, tmp_path / "hf")


@pytest.fixture
def sharded(checkpoint, tmp_path):
    return tiny.write_huggingface(checkpoint, tmp_path / "sharded", shards=3)


def config_of(directory, **fields):
    """The config for a config.json with these fields."""
    (directory / "config.json").write_text(json.dumps(tiny.hf_config(tiny.make()) | fields))
    return read_config(directory)[1]


def test_weights_load_into_their_parameters(checkpoint, directory):
    loaded = load_huggingface(directory)
    found, weights = parameters(loaded.model), checkpoint.weights
    np.testing.assert_array_equal(found["embed", "embedding"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["lm_head", "kernel"], weights["lm_head.weight"].T)
    for layer in range(tiny.LAYERS):
        for ours, theirs in (
            (("attention", "k_proj", "kernel"), "self_attn.k_proj.weight"),
            (("attention", "o_proj", "kernel"), "self_attn.o_proj.weight"),
            (("ffn", "down_proj", "kernel"), "mlp.down_proj.weight"),
            (("ffn_norm", "scale"), "post_attention_layernorm.weight"),
        ):
            np.testing.assert_array_equal(found["layers", *ours][layer], weights[f"model.layers.{layer}.{theirs}"].T)
    assert loaded.tokenizer.encode("a 12<|end|>").ids == tiny.make_tokenizer("smollm").encode("a 12<|end|>").ids


def test_shards_equal_one_file(directory, sharded):
    one, many = load_pretrained(directory).model, load_pretrained(sharded).model
    for path, array in parameters(one).items():
        np.testing.assert_array_equal(array, parameters(many)[path])
    assert one.config == many.config


@pytest.mark.parametrize("dtype", tiny.SAFETENSORS_DTYPES)
def test_dtypes_of_the_file(checkpoint, tmp_path, dtype):
    model = load_huggingface(tiny.write_huggingface(checkpoint, tmp_path, dtype=dtype)).model
    expected = checkpoint.weights["model.embed_tokens.weight"].astype(tiny.SAFETENSORS_DTYPES[dtype])
    assert model.embed.embedding[...].dtype == jnp.float32
    np.testing.assert_array_equal(model.embed.embedding[...], expected.astype(np.float32))


def test_tied_copies_and_stored_frequencies_are_ignored(checkpoint, tmp_path):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    copy = {"lm_head.weight": checkpoint.weights["model.embed_tokens.weight"]}
    noisy = dataclasses.replace(
        checkpoint, weights=checkpoint.weights | frequencies | copy, config={"tie_word_embeddings": True}
    )
    model = load_huggingface(tiny.write_huggingface(noisy, tmp_path)).model
    assert model.config.tie_embeddings
    assert not hasattr(model, "lm_head")


@pytest.mark.parametrize("row", [0, 200])
def test_a_head_that_differs_from_tied_embeddings_is_used(checkpoint, tmp_path, row):
    """As transformers does; the first half is equal."""
    head = checkpoint.weights["model.embed_tokens.weight"].copy()
    head[row, 5] += 1
    tied = dataclasses.replace(
        checkpoint, weights=checkpoint.weights | {"lm_head.weight": head}, config={"tie_word_embeddings": True}
    )
    model = load_huggingface(tiny.write_huggingface(tied, tmp_path)).model
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)


@pytest.mark.parametrize("window", [None, tiny.CONTEXT])
def test_mistral_is_llama_with_full_attention(directory, window):
    llama = load_huggingface(directory)
    assert config_of(directory, model_type="mistral", sliding_window=window) == llama.model.config
    load_huggingface(directory)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
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
        ({"model_type": "gpt2"}, "model_type 'gpt2', supported are llama, mistral, qwen2, opt, bloom"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias true, which adds a bias to o_proj too"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: load the unquantized model"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding window of 64 of 128"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            "sliding window of 64 of 128",
        ),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding window of 4096 of 8192"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "max_window_layers": 0,
                "max_position_embeddings": 4097,
            },
            "sliding window of 4096 of 4097",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
            },
            "sliding window of 64 of 128",
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
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quantization_config": None}, {}),
        ({"quantization_config": {}}, {}),
        ({"hidden_act": "swish"}, {}),
        ({"model_type": "mistral", "sliding_window": 4096}, {}),
        ({"model_type": "mistral"}, {}),
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


def test_missing_files(directory, sharded, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory .*none"):
        load_huggingface(tmp_path / "none")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json in .*hf"):
        load_huggingface(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in .*hf: download it"):
        load_huggingface(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in .*hf: download"):
        load_huggingface(directory)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard model-00002-of-00003.safetensors of .* is missing: download"):
        load_huggingface(sharded)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("text", [b'{"a": ', b"", b"\xff\xfe\x00", b"[1, 2]"])
def test_damaged_json(directory, name, text):
    (directory / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name} (is damaged|holds a list).*download it again"):
        load_huggingface(directory)


def test_damaged_index(sharded):
    index = sharded / "model.safetensors.index.json"
    for text, message in (
        ('{"weight_map": ', "index.json is damaged: .*download it again"),
        ("{}", "index.json has no weight_map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "'../../etc/passwd', expected a file name"),
        ('{"weight_map": {"a": "model\\u0000.safetensors"}}', "expected a file name"),
        ('{"weight_map": {"a": "model\\ud800.safetensors"}}', "expected a file name"),
        (json.dumps({"weight_map": {"a" * 5000: "b" * 5000}}), "places 'aaaa.{,100} in 'bbb.{,100}, expected a file"),
        ('{"weight_map": {"a": 5}}', "in 5, expected a file name"),
        ('{"weight_map": ' + "[" * 100_000, "index.json is damaged"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_huggingface(sharded)


def test_index_that_names_a_tensor_its_shard_lacks(sharded):
    index = sharded / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="00001-of-00003.safetensors lacks the tensor 'model.norm.weight'"):
        load_huggingface(sharded)


def test_truncated_and_damaged_weights(directory):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, *range(10, header, 211), header, header + 1, len(whole) // 2, len(whole) - 1]
    damaged = [whole[:size] for size in cuts]
    damaged += [b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:], whole + b"x"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="model.safetensors is a damaged or incomplete .* download it again"):
            load_huggingface(directory)


def test_missing_unexpected_and_misshaped_tensors_are_rejected(checkpoint, directory):
    path = directory / "model.safetensors"
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = checkpoint.weights
    for weights, message in (
        ({key: array for key, array in whole.items() if key != name}, "missing tensors layers/1/attention/q_proj/ker"),
        (whole | {"model.layers.0.self_attn.sinks": np.ones(6)}, "unexpected tensor 'model.layers.0.self_attn.sinks'"),
        (whole | {"model.layers.3.mlp.up_proj.weight": np.ones((96, 64), np.float32)}, "num_layers=3"),
        (whole | {name: np.ones((96, 32), np.float32)}, r"shape \(32, 96\), but the config asks for \(64, 96\)"),
        (whole | {name: np.ones((96, 64), np.int8)}, "q_proj.weight' has dtype I8, supported are F32, F16, BF16"),
        (whole | {name: np.full((96, 64), np.inf, np.float32)}, "6144 values of 6144 that are not finite"),
    ):
        safetensors.numpy.save_file(weights, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_huggingface(directory)
        assert str(directory) in str(caught.value)


def test_long_names_are_cut_short(checkpoint, directory):
    safetensors.numpy.save_file(checkpoint.weights | {"x" * 900: np.ones(1)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected tensor 'xxx") as caught:
        load_huggingface(directory)
    assert len(str(caught.value)) < 500


def test_a_file_without_read_permission_is_not_called_damaged(directory, monkeypatch):
    path = directory / "model.safetensors"
    open_path = Path.open

    def denied(self, *args, **settings):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return open_path(self, *args, **settings)

    monkeypatch.setattr(Path, "open", denied)  # root may read any file
    with pytest.raises(PermissionError, match="model.safetensors"):
        load_huggingface(directory)


def test_tokenizer_of_another_model(directory):
    with pytest.raises(ValueError, match="tokenizer.json has token id .*, but config.json has vocab_size=100"):
        config_of(directory, vocab_size=100)
        load_huggingface(directory)
