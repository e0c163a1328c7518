"""Tiny random transformers of every architecture; every bias and norm is random too, so that none can be forgotten."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=37, hidden_size=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, ffn_size=20, context_length=32
)
_BIASED = dict(norm="layer", qkv_bias=True, linear_bias=True)
# By what a model has; each also with the other choice of `tie_embeddings`, see `tied`.
ARCHITECTURES = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(CONFIG, qkv_bias=True, tie_embeddings=True),
    "opt": dataclasses.replace(CONFIG, positions="learned", ffn="relu", tie_embeddings=True, **_BIASED),
    "bloom": dataclasses.replace(
        CONFIG, positions="alibi", ffn="gelu", embed_norm=True, tie_embeddings=True, num_kv_heads=6, **_BIASED
    ),
}
# After Llama; windows are shorter than the texts of tests.
_GEMMA = dict(
    ffn="geglu",
    post_norms=True,
    embed_scale=24**0.5,
    attention_scale=0.3,
    window=3,
    tie_embeddings=True,
    num_kv_heads=3,
)
NEWER_ARCHITECTURES = {
    "mistral": dataclasses.replace(CONFIG, window=3),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True),
    "gemma2": dataclasses.replace(
        CONFIG, attention_softcap=1.5, logit_softcap=4.0, window_layers=(0, 2), num_layers=3, **_GEMMA
    ),
    "gemma3": dataclasses.replace(
        CONFIG, qk_norm=True, window_layers=(0, 2), window_rope_theta=50.0, num_layers=3, **_GEMMA
    ),
    "phi4": dataclasses.replace(
        CONFIG,
        rotary_dim=6,
        rope_scaling=RopeScaling("longrope", 4.0, 5, factors=(4.0, 5.0, 6.0), short_factors=(1.0, 1.5, 2.0)),
    ),
    "bitnet": dataclasses.replace(CONFIG, ffn="relu2glu", sub_norms=True),
}


def tied(config: TransformerConfig, tie: bool = True) -> TransformerConfig:
    """The config with the output layer tied to the embedding, or not."""
    return dataclasses.replace(config, tie_embeddings=tie)


def random_transformer(config: TransformerConfig, seed: int = 0, dtype=jnp.float32) -> Transformer:
    """A model whose parameters are all random."""
    rng = np.random.default_rng(seed)
    spread = {"kernel": config.hidden_size**-0.5, "embedding": 1.0, "scale": 0.3, "bias": 0.3}

    def fill(path, variable):
        values = (path[-1] == "scale") + spread[path[-1]] * rng.standard_normal(variable.shape)
        return path, variable.replace(jnp.asarray(values, dtype))

    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, param_dtype=dtype, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.from_flat_state(fill(*item) for item in nnx.to_flat_state(state)))


def random_ids(*shape: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)
