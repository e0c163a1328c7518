"""GGUF files: equal weights in a GGUF file and a Hugging Face directory give equal models."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.models.config import RopeScaling
from bipolar_jax.models.loaders import load_gguf, load_huggingface, load_pretrained
from tests.support import tiny_checkpoints as tiny

IDS = jnp.array([[5, 300, 17, 42, 8, 8, 101], [1, 2, 3, 4, 5, 6, 7]])
# Compiled once per config.
logits = jax.jit(lambda model: model(IDS))


def parameters(model) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same_parameters(one, other):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg="/".join(path))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_and_huggingface_agree(tmp_path, arch, tied):
    checkpoint = tiny.make(arch, tied=tied)
    ours = load_pretrained(tiny.write_gguf(checkpoint, tmp_path / "model.gguf"))
    theirs = load_pretrained(tiny.write_huggingface(checkpoint, tmp_path / "hf"))
    assert ours.model.config == theirs.model.config
    assert ours.model.config.eos_ids == (1, 2)
    assert ours.model.config.qkv_bias == (arch == "qwen2")
    assert_same_parameters(ours.model, theirs.model)
    np.testing.assert_array_equal(logits(ours.model), logits(theirs.model))


@pytest.mark.parametrize("type_name", tiny.GGUF_TYPES)
def test_every_tensor_type_dequantizes_to_the_same_weights(tmp_path, type_name):
    checkpoint = tiny.make()
    ours = load_gguf(tiny.write_gguf(checkpoint, tmp_path / "model.gguf", type_name))
    rounded = checkpoint.rounded(type_name)
    theirs = load_huggingface(tiny.write_huggingface(rounded, tmp_path / "hf"))
    assert_same_parameters(ours.model, theirs.model)
    if type_name != "F32":  # the type changes the weights
        name = "model.layers.1.mlp.up_proj.weight"
        assert np.any(rounded.weights[name] != checkpoint.weights[name])


def test_biases_of_llama_are_unpermuted_like_the_rows(tmp_path):
    """The Hugging Face loader rejects Llama with biases, so compare with Qwen2."""
    checkpoint = tiny.make("qwen2")
    as_llama = dataclasses.replace(checkpoint, arch="llama")
    ours = load_gguf(tiny.write_gguf(as_llama, tmp_path / "llama.gguf"))
    theirs = load_gguf(tiny.write_gguf(checkpoint, tmp_path / "qwen2.gguf"))
    assert_same_parameters(ours.model, theirs.model)


def test_dtype_of_the_parameters(tmp_path):
    path = tiny.write_gguf(tiny.make(), tmp_path / "model.gguf", "Q8_0")
    half, full = load_gguf(path, jnp.bfloat16), load_gguf(path)
    for name, array in parameters(full.model).items():
        np.testing.assert_array_equal(parameters(half.model)[name], array.astype(jnp.bfloat16))


ROPE_CASES = {
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        RopeScaling(kind="linear", factor=4.0),
    ),
    "linear, without a type": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"llama.rope.scale_linear": 2.0},
        RopeScaling(kind="linear", factor=2.0),
    ),
    "none": ({}, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 64,
        },
        RopeScaling(kind="yarn", factor=4.0, original_context_length=64),
    ),
}


@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_scaling_in_the_metadata(tmp_path, case):
    config, metadata, expected = ROPE_CASES[case]
    checkpoint = tiny.make(config=config, metadata=metadata)
    ours = load_gguf(tiny.write_gguf(checkpoint, tmp_path / "model.gguf"))
    theirs = load_huggingface(tiny.write_huggingface(checkpoint, tmp_path / "hf"))
    assert ours.model.config == theirs.model.config
    assert ours.model.config.rope_scaling == expected


def test_yarn_attention_factor_multiplies_the_derived_one(tmp_path):
    metadata = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.yarn_attn_factor": 0.5,
    }
    scaling = load_gguf(tiny.write_gguf(tiny.make(metadata=metadata), tmp_path / "m.gguf")).model.config.rope_scaling
    assert scaling.attention_factor == pytest.approx(0.5 * (0.1 * np.log(4.0) + 1))
    assert scaling.original_context_length == tiny.CONTEXT


def llama3_factors() -> np.ndarray:
    """rope_freqs as computed by llama.cpp's converter for factor 8, bands 1 and 4, original context 64."""
    factors = []
    for frequency in 10000.0 ** (-np.arange(0, tiny.HEAD_DIM, 2) / tiny.HEAD_DIM):
        wavelength = 2 * np.pi / frequency
        if wavelength < 64 / 4:
            factors.append(1.0)
        elif wavelength > 64 / 1:
            factors.append(8.0)
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


def test_rope_factors_tensor_is_llama3_scaling(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    factors = llama3_factors()
    assert len(set(factors.tolist())) > 2, "the factors must include the interpolated band"
    checkpoint = tiny.make(config={"rope_scaling": scaling}, extra={"rope_freqs.weight": factors})
    ours = load_gguf(tiny.write_gguf(checkpoint, tmp_path / "model.gguf")).model
    theirs = load_huggingface(tiny.write_huggingface(checkpoint, tmp_path / "hf")).model
    assert ours.config.rope_scaling == RopeScaling(kind="factors", factors=factors)
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-5)
    plain = load_huggingface(tiny.write_huggingface(tiny.make(), tmp_path / "plain")).model
    assert np.abs(logits(plain) - logits(theirs)).max() > 1e-3, "the scaling must matter"


def test_head_dim_from_older_keys(tmp_path):
    metadata = {
        "llama.attention.key_length": None,
        "llama.attention.value_length": None,
        "llama.rope.dimension_count": tiny.HEAD_DIM,
    }
    model = load_gguf(tiny.write_gguf(tiny.make(metadata=metadata), tmp_path / "model.gguf")).model
    assert model.config.head_dim == tiny.HEAD_DIM


UNSUPPORTED = {
    "architecture": ({"general.architecture": "mamba"}, "architecture 'mamba', supported are llama, qwen2"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_used_count"),
    "shared experts": ({"llama.expert_count": 8, "llama.expert_shared_count": 1}, "1 experts that every token runs"),
    "window": ({"llama.attention.sliding_window": 0.5}, "sliding_window' is 0.5, expected an integer of at least 0"),
    "split": ({"split.count": 3}, "one part of a split model"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "16 key, 16 value and 8 rotary"),
    "rope scaling": ({"llama.rope.scaling.type": "longrope"}, "'longrope', supported are none, linear, yarn"),
    "layers": ({"llama.block_count": 4}, "missing tensors layers/3/"),
    "fewer layers": ({"llama.block_count": 2}, "of layer 2, but the config has num_layers=2"),
    "hidden size": ({"llama.embedding_length": 2**32 - 1}, "shape .* asks for"),
    "huge layers": ({"llama.block_count": 2**32 - 1}, "missing tensors"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count' is 0, expected an integer of at least 1"),
    "head groups": ({"llama.attention.head_count_kv": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
    "stretch": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5}, "factor must be at least 1"),
    "heads as text": ({"llama.attention.head_count": "6"}, "head_count' is '6', expected an integer"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "no metadata key .*rms_epsilon"),
    "frequency": ({"llama.rope.freq_base": float("nan")}, "freq_base' is nan, expected a positive number"),
    "eos": ({"tokenizer.ggml.eos_token_id": 5000}, "BOS or EOS id 5000 is outside the vocabulary"),
}


@pytest.mark.parametrize("key", ["GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"])
def test_keys_of_any_name_are_harmless(tmp_path, key):
    load_gguf(tiny.write_gguf(tiny.make(metadata={key: 3}), tmp_path / "model.gguf"))


@pytest.mark.parametrize("count", [1, 7, 9, 2**17])
def test_a_wrong_number_of_rope_factors_is_refused(tmp_path, count):
    factors = {"rope_freqs.weight": np.ones(count, np.float32)}
    path = tiny.write_gguf(tiny.make(extra=factors), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=rf"model.gguf.* has {count:,} (explicit|RoPE) factors"):
        load_gguf(path)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_metadata_is_rejected(tmp_path, case):
    metadata, message = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(tiny.write_gguf(tiny.make(metadata=metadata), tmp_path / "model.gguf"))
    assert str(tmp_path / "model.gguf") in str(caught.value)


def test_missing_unexpected_and_misshaped_tensors_are_rejected(tmp_path):
    checkpoint = tiny.make()
    name = "model.layers.1.self_attn.q_proj.weight"
    without = {key: array for key, array in checkpoint.weights.items() if key != name}
    for weights, extra, message in (
        (without, {}, "missing tensors layers/1/attention/q_proj/kernel:"),
        (
            checkpoint.weights,
            {"blk.0.attn_sinks.weight": np.ones(6, np.float32)},
            "unexpected tensor 'blk.0.attn_sinks",
        ),
        (checkpoint.weights | {name: np.ones((96, 32), np.float32)}, {}, r"shape \(32, 96\), .* asks for \(64, 96\)"),
        (checkpoint.weights | {name: np.full((96, 64), np.nan, np.float32)}, {}, "6144 values of 6144 .* not finite"),
    ):
        path = tiny.write_gguf(dataclasses.replace(checkpoint, weights=weights, extra=extra), tmp_path / "model.gguf")
        with pytest.raises(ValueError, match=message):
            load_gguf(path)


def test_an_unsupported_tensor_type_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"type F64 \(28\), supported are F32, F16, Q4_0, Q4_1, Q5_0,"):
        load_gguf(tiny.write_gguf(tiny.make(extra={"blk.0.attn_q.bias": np.ones(96)}), tmp_path / "model.gguf"))


def test_a_path_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GGUF file at .*none.gguf"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.gguf"):
        load_pretrained(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="a directory without config.json"):
        load_pretrained(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a file named \*.bin: give a .gguf file"):
        load_pretrained(tmp_path / "model.bin")


@pytest.mark.parametrize("library", ["gguf", "tokenizers", "safetensors"])
def test_missing_libraries_name_the_extra(tmp_path, monkeypatch, library):
    write = tiny.write_huggingface if library == "safetensors" else tiny.write_gguf
    path = write(tiny.make(), tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}.* is not installed: pip install 'bipolar_jax\[models\]'"):
        (load_huggingface if library == "safetensors" else load_gguf)(path)
