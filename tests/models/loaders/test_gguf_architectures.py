"""GGUF files of architectures after Llama give the model that the Hugging Face directory of the same weights gives."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from bipolar_jax.models.loaders import load_gguf, load_huggingface
from tests.models.loaders.golden import checkpoints
from tests.support import tiny_checkpoints as tiny

GOLDEN = checkpoints.read()
# By golden checkpoint: fields that differ where llama.cpp derives them, and further keys of the file.
CASES = {
    "qwen3 0.6b": ({}, {}),
    "mistral 0.1, a window": ({}, {"llama.attention.sliding_window": 5}),
    "mixtral 8x7b": ({}, {"llama.expert_count": 4, "llama.expert_used_count": 2}),
    "qwen3 30b a3b": (
        {},
        {
            "qwen3moe.expert_count": 6,
            "qwen3moe.expert_used_count": 3,
            "qwen3moe.expert_feed_forward_length": 20,
        },
    ),
    "gemma 2": (
        {"query_pre_attn_scalar": 12},
        {
            "gemma2.attention.sliding_window": 5,
            "gemma2.attn_logit_softcapping": 2.0,
            "gemma2.final_logit_softcapping": 8.0,
        },
    ),
    "gemma 3 4b": (
        {},
        {
            "gemma3.attention.sliding_window": 4,
            "gemma3.attention.sliding_window_pattern": [False, True],
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
            "gemma3.rope.freq_base": 1e6,
        },
    ),
    "phi 3 mini 4k": ({}, {"phi3.attention.sliding_window": 7}),
    "phi 4 mini": (
        {},
        {
            "phi3.attention.sliding_window": 0,
            "phi3.rope.dimension_count": 6,
            "phi3.rope.scaling.original_context_length": 16,
            "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(2) / np.log(16))),
        },
    ),
}
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(name: str, path, metadata=None, extra=None, type_name="F32", **changes):
    """The golden checkpoint as llama.cpp's converter would write it: gains of Gemma's norms with the 1 added.

    `changes` are further fields of config.json.
    """
    fields, keys = CASES[name]
    config = GOLDEN[name].configs["4"] | fields | changes
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    is_gemma = arch.startswith("gemma")
    names = NAMES | (GEMMA_NAMES if is_gemma else {})
    weights = {}
    for stored, array in checkpoints.with_experts_together(checkpoints.make_weights(config)).items():
        for theirs, ours in names.items():
            stored = stored.replace(theirs, ours)
        if stored.endswith("mlp.experts.gate_up_proj"):
            for name, part in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                weights[stored.replace("mlp.experts.gate_up_proj", f"ffn_{name}_exps.weight")] = part
            continue
        weights[stored] = array + np.float32(is_gemma and array.ndim == 1)
    tokens = ["a", "b", "ab", *(f"token{token}" for token in range(3, config["vocab_size"]))]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    keys = keys | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["a b"],
    }
    scaling = config.get("rope_scaling") or {}
    if "short_factor" in scaling:
        factors = {kind: np.array(scaling[f"{kind}_factor"], np.float32) for kind in ("short", "long")}
        extra = {f"rope_factors_{kind}.weight": array for kind, array in factors.items()} if extra is None else extra
    checkpoint = tiny.Tiny(
        arch, weights, config=config | {"head_dim": head_dim}, metadata=keys | (metadata or {}), extra=extra or {}
    )
    return tiny.write_gguf(checkpoint, path, type_name)


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_directory_of_the_same_weights(tmp_path, name):
    fields, _ = CASES[name]
    config = GOLDEN[name].configs["4"] | fields
    directory = checkpoints.write(tmp_path / "hf", config, checkpoints.make_weights(config), np.float32, 1)
    expected = load_huggingface(directory).model
    found = load_gguf(write_gguf(name, tmp_path / "model.gguf")).model
    ids = dict(bos_id=expected.config.bos_id, eos_ids=expected.config.eos_ids)
    if expected.config.rope_scaling is not None and expected.config.rope_scaling.kind == "longrope":
        scaling = found.config.rope_scaling
        np.testing.assert_allclose(scaling.attention_factor, np.sqrt(1 + np.log(2) / np.log(16)), rtol=1e-7)
        factors = dict(factors=scaling.factors, short_factors=scaling.short_factors)  # float32 in the file
        scaling = dataclasses.replace(
            expected.config.rope_scaling, attention_factor=scaling.attention_factor, **factors
        )
        expected.config = dataclasses.replace(expected.config, rope_scaling=scaling)
    assert dataclasses.replace(found.config, **ids) == expected.config
    parameters, others = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(parameters) == len(others) > 10
    for parameter, other in zip(parameters, others, strict=True):
        np.testing.assert_array_equal(parameter, other)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("qwen3 0.6b", {"qwen3.attention.sliding_window": 5}, "does not say in which layers"),
        ("gemma 3 4b", {"gemma3.attention.sliding_window_pattern": [True]}, "has 1 values for 2 layers"),
        ("gemma 3 4b", {"gemma3.block_count": 2**31 - 1}, "2147483647 layers, at most 65536 are plausible"),
        ("gemma 2", {"gemma2.attn_logit_softcapping": -1.0}, "attn_logit_softcapping' is -1.0, expected a positive"),
        ("phi 4 mini", {"phi3.rope.scaling.type": "yarn"}, "both RoPE scaling 'yarn' and RoPE factors"),
        ("phi 4 mini", {"phi3.rope.dimension_count": 4}, "RoPE has 3 explicit factors; 4 rotated numbers"),
        ("phi 3 mini 4k", {"phi3.feed_forward_length": 41}, r"shape \(80, 32\), its rows are not the \[41, 41\]"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, name, metadata, message):
    path = write_gguf(name, tmp_path / "model.gguf", metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)


def test_short_factors_need_long_ones(tmp_path):
    extra = {"rope_factors_short.weight": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="short or long RoPE factors, but not both"):
        load_gguf(write_gguf("phi 4 mini", tmp_path / "model.gguf", extra=extra))
