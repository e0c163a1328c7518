"""`TransformerConfig` and `RopeScaling`: what they refuse, and the way through JSON and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops import Hadamard

CONFIG = TransformerConfig(
    vocab_size=11, hidden_size=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=5, context_length=16
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_size",
    "context_length",
)


def through_json(config: TransformerConfig) -> TransformerConfig:
    return TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 5e5, "norm_eps": 1e-6, "tie_embeddings": True, "qkv_bias": True},
        {"bos_id": 0, "eos_ids": (1, 10)},
        {"norm": "layer", "positions": "learned", "ffn": "relu", "linear_bias": True},
        {"norm": "layer", "positions": "alibi", "ffn": "gelu", "embed_norm": True},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rotation": Rotation(Hadamard((8,), signs=7), ffn=Hadamard((), 5), keys=Hadamard((4,)))},
        {"rotation": Rotation(Hadamard((2,), 4), enters=True, leaves=True), "tie_embeddings": True},
        {"rope_scaling": RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.5, high_freq_factor=3.5)},
        {"rope_scaling": RopeScaling("yarn", 4.0, 32768, beta_fast=16, beta_slow=2, attention_factor=1.25)},
        {"rope_scaling": RopeScaling("factors", factors=(1.0, 32.0))},
    ],
    ids=str,
)
def test_a_config_survives_json(fields):
    config = dataclasses.replace(CONFIG, **fields)
    restored = through_json(config)
    assert restored == config
    assert hash(restored) == hash(config)  # lists have become tuples again


def test_lists_are_taken_as_tuples_so_that_configs_stay_hashable():
    assert dataclasses.replace(CONFIG, eos_ids=[1, 2]).eos_ids == (1, 2)
    assert RopeScaling("factors", factors=[1, 2]).factors == (1.0, 2.0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_must_be_positive(size, value):
    with pytest.raises(ValueError, match=f"{size} must be at least 1, got {value}"):
        dataclasses.replace(CONFIG, **{size: value})


def test_query_heads_must_share_key_heads_equally():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        dataclasses.replace(CONFIG, num_kv_heads=3)


def test_heads_must_be_even_for_rotary_pairs():
    with pytest.raises(ValueError, match="head_dim must be even for rotary embeddings, got 5"):
        dataclasses.replace(CONFIG, head_dim=5)


@pytest.mark.parametrize("positions", ["learned", "alibi"])
def test_only_rotary_positions_ask_for_even_heads_and_can_be_stretched(positions):
    assert dataclasses.replace(CONFIG, positions=positions, head_dim=5).head_dim == 5
    with pytest.raises(ValueError, match=f"rope_scaling has no meaning for positions '{positions}': leave it None"):
        dataclasses.replace(CONFIG, positions=positions, rope_scaling=RopeScaling("linear", 2.0))


@pytest.mark.parametrize(
    ("field", "known"),
    [("norm", "rms, layer"), ("positions", "rope, learned, alibi"), ("ffn", "swiglu, relu, gelu")],
)
def test_unknown_choices_list_the_known(field, known):
    with pytest.raises(ValueError, match=f"{field} 'new' is unknown: use one of {known}"):
        dataclasses.replace(CONFIG, **{field: "new"})


@pytest.mark.parametrize("field", ["rope_theta", "norm_eps"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_constants_must_be_positive_and_finite(field, value):
    with pytest.raises(ValueError, match=f"{field} must be positive and finite, got {value}"):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize("fields", [{"bos_id": 11}, {"eos_ids": (1, 11)}, {"eos_ids": (11,), "bos_id": 0}], ids=str)
def test_special_ids_must_be_in_the_vocabulary(fields):
    with pytest.raises(ValueError, match=r"BOS or EOS id 11 is outside the vocabulary 0\.\.10"):
        dataclasses.replace(CONFIG, **fields)


def test_unknown_fields_are_named():
    fields = CONFIG.to_dict() | {"windows": 3, "bias": True}
    with pytest.raises(ValueError, match=r"unknown fields \['bias', 'windows'\]"):
        TransformerConfig.from_dict(fields)


@pytest.mark.parametrize("size", SIZES)
def test_missing_fields_are_named(size):
    fields = CONFIG.to_dict()
    del fields[size]
    with pytest.raises(ValueError, match=f"missing or unknown fields: .*'{size}'"):
        TransformerConfig.from_dict(fields)


def test_defaulted_fields_may_be_missing():
    fields = {size: getattr(CONFIG, size) for size in SIZES}
    assert TransformerConfig.from_dict(fields) == CONFIG


def test_configs_written_before_there_were_other_families_are_of_llama():
    choices = {"norm": "rms", "positions": "rope", "ffn": "swiglu", "linear_bias": False, "embed_norm": False}
    written = {name: value for name, value in CONFIG.to_dict().items() if name not in choices}
    assert TransformerConfig.from_dict(written) == dataclasses.replace(CONFIG, **choices)


@pytest.mark.parametrize(
    "scaling", [{"kind": "linear", "stretch": 2.0}, {"factor": 2.0}, {"kind": "linear", "factor": 0.5}], ids=str
)
def test_a_damaged_rope_scaling_is_a_value_error(scaling):
    with pytest.raises(ValueError, match=r"stretch|kind|factor"):
        TransformerConfig.from_dict(CONFIG.to_dict() | {"rope_scaling": scaling})


def test_unknown_rope_scaling_lists_the_known():
    with pytest.raises(
        ValueError, match="'ntk' is unknown: use one of linear, llama3, yarn, factors, longrope, or None"
    ):
        RopeScaling("ntk")


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rope_scaling_does_not_shrink(kind):
    with pytest.raises(ValueError, match=r"factor must be at least 1, got 0\.5"):
        RopeScaling(kind, 0.5, original_context_length=64)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
@pytest.mark.parametrize("length", [None, 0])
def test_rope_scaling_by_bands_needs_the_original_context(kind, length):
    with pytest.raises(ValueError, match=f"'{kind}' needs original_context_length"):
        RopeScaling(kind, 2.0, original_context_length=length)


@pytest.mark.parametrize(
    ("rotation", "fields", "message"),
    [
        (Rotation(Hadamard((4,))), {}, "rotation.stream is of 4 numbers, the model has 8"),
        (Rotation(ffn=Hadamard((4,))), {}, "rotation.ffn is of 4 numbers, the model has 5"),
        (Rotation(Hadamard((8,)), leaves=True), {"tie_embeddings": True}, "tied embedding.* rotation.enters"),
        (Rotation(Hadamard((8,))), {"norm": "layer"}, "LayerNorm, needs rotation.leaves"),
    ],
)
def test_rotations_must_fit_the_model(rotation, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, rotation=rotation, **fields)


@pytest.mark.parametrize(
    "rotation",
    [
        {"stream": 3},
        {"stream": {"orders": [3]}},
        {"ffn": {"orders": [1], "blocks": 5, "angle": 1}},
        {"stream": None, "enters": True},
        {"leaves": 1},
        {"other": None},
        [1],
    ],
    ids=str,
)
def test_damaged_rotations_are_refused(rotation):
    with pytest.raises(ValueError, match="rotat|Hadamard|unknown fields"):
        TransformerConfig.from_dict(CONFIG.to_dict() | {"rotation": rotation})
