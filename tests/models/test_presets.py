"""Presets have the parameter counts that the models were published with."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from bipolar_jax.models.presets import preset
from bipolar_jax.models.transformer import Transformer

# Of the weights on the Hugging Face Hub, tied embeddings counted once.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "opt-6.7b": 6_658_473_984,
    "bloom-7b1": 7_069_016_064,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "bitnet-2b": 2_412_820_480,
}
# OPT's table of positions is published with two rows that no position reads; we leave them out.
UNUSED = {"opt-6.7b": 2 * 4096}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_as_published(name):
    model = nnx.eval_shape(lambda: Transformer(preset(name), rngs=nnx.Rngs(0)))
    found = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert found + UNUSED.get(name, 0) == PUBLISHED[name]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=f"no preset 'gpt-2': choose one of {', '.join(PUBLISHED)}$"):
        preset("gpt-2")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama-2-7b", {"rope_theta": 1e4, "context_length": 4096, "norm_eps": 1e-5, "num_kv_heads": 32}),
        ("llama-2-70b", {"num_heads": 64, "num_kv_heads": 8, "head_dim": 128}),
        ("llama-3-8b", {"rope_theta": 5e5, "context_length": 8192, "tie_embeddings": False}),
        ("opt-6.7b", {"positions": "learned", "ffn": "relu", "norm": "layer", "tie_embeddings": True}),
        ("bloom-7b1", {"positions": "alibi", "ffn": "gelu", "norm": "layer", "embed_norm": True}),
        ("smollm2-1.7b", {"rope_theta": 130000.0, "context_length": 8192, "tie_embeddings": True}),
        ("qwen2.5-0.5b", {"rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True, "tie_embeddings": True}),
        ("qwen3-1.7b", {"rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True, "qkv_bias": False}),
        ("gemma-2-2b", {"attention_scale": 1 / 16, "embed_scale": 48.0, "window": 4096, "logit_softcap": 30.0}),
        ("gemma-3-1b", {"rope_theta": 1e6, "window_rope_theta": 1e4, "window": 512, "attention_softcap": None}),
        ("phi-3-mini", {"window": 2047, "window_layers": None, "rope_scaling": None}),
        ("mistral-7b", {"window": 4096, "window_layers": None, "rope_theta": 1e4}),
        ("qwen2.5-7b", {"rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True, "tie_embeddings": False}),
    ],
)
def test_constants_that_no_count_shows(name, fields):
    config = preset(name)
    assert {field: getattr(config, field) for field in fields} == fields
