"""Hugging Face directories of OPT and BLOOM: configs, weights, and errors for damaged files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.models.loaders.huggingface.config import read_config
from tests.models.loaders import tiny_opt_bloom as tiny

MAKE = {"opt": tiny.make_opt, "bloom": tiny.make_bloom}
EXPECTED = TransformerConfig(
    vocab_size=tiny.VOCAB,
    hidden_size=32,
    num_layers=tiny.LAYERS,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_size=80,
    context_length=tiny.CONTEXT,
    norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=True,
    norm="layer",
    positions="learned",
    ffn="relu",
    linear_bias=True,
    bos_id=2,
    eos_ids=(2,),
)
EXPECTED_BLOOM = dataclasses.replace(
    EXPECTED, positions="alibi", ffn="gelu", embed_norm=True, ffn_size=128, norm_eps=1e-3, bos_id=1
)


def config_of(directory: Path, kind: str, **fields) -> TransformerConfig:
    """The config for a config.json with these fields; None removes a field."""
    (directory / "config.json").write_text(json.dumps(MAKE[kind](**fields).config))
    return read_config(directory)[1]


def test_configs(tmp_path):
    assert config_of(tmp_path, "opt") == EXPECTED
    assert config_of(tmp_path, "bloom") == EXPECTED_BLOOM


@pytest.mark.parametrize("name", ["do_layer_norm_before", "word_embed_proj_dim", "activation_function"])
def test_defaults_of_absent_opt_fields(tmp_path, name):
    assert config_of(tmp_path, "opt", **{name: None}) == EXPECTED


@pytest.mark.parametrize(
    "fields",
    [
        {"n_embed": None, "hidden_size": 32},
        {"num_attention_heads": None, "n_head": 4},
        {"n_layer": None, "num_hidden_layers": tiny.LAYERS},
        {"apply_residual_connection_post_layernorm": None},
    ],
    ids=str,
)
def test_alternative_names_of_bloom_fields(tmp_path, fields):
    assert config_of(tmp_path, "bloom", **fields) == EXPECTED_BLOOM


def test_bloom_without_a_length_has_2048_positions(tmp_path):
    assert config_of(tmp_path, "bloom", seq_length=None).context_length == 2048


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, r"do_layer_norm_before false \(as OPT-350m\): only norms before"),
        ("opt", {"word_embed_proj_dim": 16}, r"word_embed_proj_dim 16 and hidden_size 32 \(as OPT-350m\)"),
        ("opt", {"activation_function": "gelu"}, "activation_function 'gelu', supported is 'relu'"),
        ("opt", {"enable_bias": False}, "enable_bias false: only OPT with all biases"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine false: only OPT"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm true: only OPT with a final norm"),
        ("opt", {"ffn_dim": None}, "ffn_dim is None, expected an integer of at least 1"),
        ("opt", {"max_position_embeddings": -1}, "max_position_embeddings is -1, expected an integer"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "only residuals from before the norm"),
        ("bloom", {"n_embed": None}, "hidden_size is None, expected an integer of at least 1"),
        ("bloom", {"num_attention_heads": None}, "n_head is None, expected an integer of at least 1"),
        ("bloom", {"n_layer": "3"}, "n_layer is '3', expected an integer of at least 1"),
        ("bloom", {"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0, expected a positive number"),
        ("bloom", {"eos_token_id": 10**6}, r"eos_token_id is \[1000000\], expected ids below"),
    ],
)
def test_unsupported_configs_are_rejected(tmp_path, kind, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(tmp_path, kind, **fields)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("kind", MAKE)
def test_tied_copies_are_ignored_and_other_heads_loaded(tmp_path, kind):
    head = np.random.default_rng(1).standard_normal((tiny.VOCAB, 32)).astype(np.float32)
    checkpoint = MAKE[kind]()
    (embedding,) = (
        array
        for name, array in checkpoint.weights.items()
        if "word_emb" in name or "embed_tok" in name
        if array.ndim == 2
    )
    checkpoint.weights["lm_head.weight"] = embedding
    assert not hasattr(load_huggingface(checkpoint.write(tmp_path / "tied")).model, "lm_head")
    checkpoint.weights["lm_head.weight"] = head
    model = load_huggingface(checkpoint.write(tmp_path / "other")).model
    np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)
    checkpoint.config["tie_word_embeddings"] = False
    model = load_huggingface(checkpoint.write(tmp_path / "untied")).model
    np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)


@pytest.mark.parametrize("kind", MAKE)
def test_bfloat16_files(tmp_path, kind):
    checkpoint = MAKE[kind]()
    whole = load_huggingface(checkpoint.write(tmp_path / "float32"), jnp.bfloat16).model
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in checkpoint.weights.items()}
    half = load_huggingface(tiny.Checkpoint(checkpoint.config, rounded).write(tmp_path / "half"), jnp.bfloat16).model
    for layer in ("q_proj", "v_proj"):
        found, expected = (getattr(model.layers.attention, layer).kernel[...] for model in (half, whole))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected)


FUSED, FUSED_BIAS = (f"h.1.self_attention.query_key_value.{kind}" for kind in ("weight", "bias"))
POSITIONS = "model.decoder.embed_positions.weight"


def filled(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("opt", {"model.decoder.layers.2.fc1.bias": None}, "missing tensors layers/2/ffn/up_proj/bias"),
        ("opt", {POSITIONS: None}, "missing tensors positions/embedding"),
        ("opt", {POSITIONS: filled(24, 32)}, r"positions/embedding has shape \(22, 32\), .* asks for \(24, 32\)"),
        ("opt", {POSITIONS: filled(1, 32)}, r"positions/embedding has shape \(0, 32\), .* asks for \(24, 32\)"),
        ("opt", {POSITIONS: filled()}, r"positions/embedding has shape \(\), .* asks for \(24, 32\)"),
        ("opt", {"model.decoder.project_in.weight": filled(32, 16)}, "unexpected tensor 'model.decoder.project_in.wei"),
        ("opt", {"model.decoder.layers.3.fc1.bias": filled(80)}, "is of layer 3, but the config has num_layers=3"),
        ("opt", {"decoder.layers.0.fc1.bias": filled(80)}, "layers/0/ffn/up_proj/bias occurs twice"),
        ("opt", {"model.decoder.layers.0.fc1.scale": filled(80)}, "unexpected tensor 'model.decoder.layers.0.fc1.scal"),
        ("opt", {"model.decoder.layers.0.fc1.weight": filled(32, 80)}, r"shape \(80, 32\), .* asks for \(32, 80\)"),
        ("bloom", {FUSED: None}, "missing tensors layers/1/attention/k_proj/kernel, .*q_proj/kernel, .*v_proj/kernel"),
        (
            "bloom",
            {FUSED: filled(95, 32)},
            r"shape \(95, 32\), its rows do not divide into .* of 4 heads",
        ),
        ("bloom", {FUSED: filled(84, 32)}, r"k_proj/kernel has shape \(32, 28\), .* asks for \(32, 32\)"),
        ("bloom", {FUSED: filled()}, r"shape \(\), its rows do not divide into .* of 4 heads"),
        (
            "bloom",
            {FUSED_BIAS: filled(97)},
            r"shape \(97,\), its rows do not divide into .* of 4 heads",
        ),
        ("bloom", {FUSED_BIAS: filled(96, 1)}, r"k_proj/bias has shape \(32, 1\), .* asks for \(32,\)"),
        ("bloom", {FUSED: np.full((96, 32), np.nan, np.float32)}, "1/attention/k_proj/kernel has 1024 values of 1024"),
        ("bloom", {"word_embeddings_layernorm.bias": None}, "missing tensors embed_norm/bias"),
        ("bloom", {"h.0.mlp.dense_h_to_4h": filled(3)}, "unexpected tensor 'h.0.mlp.dense_h_to_4h'"),
        ("bloom", {"h..mlp.dense_h_to_4h.bias": filled(3)}, "unexpected tensor 'h..mlp.dense_h_to_4h.bias'"),
        ("bloom", {"bias": filled(3)}, "unexpected tensor 'bias'"),
    ],
)
def test_missing_unexpected_and_misshaped_tensors_are_rejected(tmp_path, kind, changed, message):
    checkpoint = MAKE[kind]()
    weights = {name: array for name, array in (checkpoint.weights | changed).items() if array is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_huggingface(tiny.Checkpoint(checkpoint.config, weights).write(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_weights_of_another_architecture(tmp_path):
    with pytest.raises(ValueError, match="unexpected tensor 'h.0.input_layernorm.weight'"):
        load_huggingface(tiny.Checkpoint(tiny.make_opt().config, tiny.make_bloom().weights).write(tmp_path))
