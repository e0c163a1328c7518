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
