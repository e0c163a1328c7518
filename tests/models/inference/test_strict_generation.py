"""Generation under JAX's strict settings and in 64 bits: the same tokens, from every kind of model and cache."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.transformer import Transformer

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
KINDS = {
    "llama": {},
    "opt": {"positions": "learned", "ffn": "relu", "norm": "layer", "linear_bias": True},
    "bloom": {"positions": "alibi", "ffn": "gelu", "norm": "layer", "embed_norm": True},
}
SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("kind", "cache_bits"), [("llama", 4), ("opt", None), ("bloom", 8)])
def test_the_tokens_are_those_of_the_default_settings(kind, cache_bits, setting):
    model = Transformer(TransformerConfig(**SIZES, **KINDS[kind], ffn_size=48, context_length=64), rngs=nnx.Rngs(0))
    expected = generate(model, [[1, 2, 3], [4]], 4, cache_bits=cache_bits)
    with SETTINGS[setting]():
        assert generate(model, [[1, 2, 3], [4]], 4, cache_bits=cache_bits) == expected
