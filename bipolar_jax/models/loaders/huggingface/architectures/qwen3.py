"""Qwen3 (arXiv 2505.09388) as Hugging Face stores it: a Llama that normalizes each head of queries and keys."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.architectures.llama import (
    IGNORED,
    IN_LAYER,
    TOP,
    qwen_windows,
    refuse_biases,
    shared_fields,
)
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.rope import rope_config


def _translate(fields: Fields) -> dict[str, Any]:
    context = fields.size("max_position_embeddings", 32768)
    refuse_biases(fields)
    return dict(
        **shared_fields(fields, context, kv_heads=32, head_dim=128),
        **rope_config(fields, context),
        **qwen_windows(fields, context),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qk_norm=True,
    )


QWEN3 = Architecture(
    _translate,
    prefixes=("model.",),
    layers="layers.",
    top=TOP,
    in_layer=IN_LAYER | {"self_attn.q_norm": "attention/q_norm", "self_attn.k_norm": "attention/k_norm"},
    ignored=IGNORED,
)
