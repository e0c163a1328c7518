"""BitNet b1.58 2B4T (arXiv 2504.12285) as Hugging Face stores it: squared gates, and norms before last projections."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.architectures.llama import (
    IGNORED,
    IN_LAYER,
    TOP,
    refuse_biases,
    shared_fields,
)
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.rope import rope_config


def _translate(fields: Fields) -> dict[str, Any]:
    context = fields.size("max_position_embeddings", 2048)
    refuse_biases(fields, activation=("relu2",))
    return dict(
        **shared_fields(fields, context, kv_heads=5, norm_eps=1e-5),
        **rope_config(fields, context, theta=500000.0),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        ffn="relu2glu",
        sub_norms=True,
    )


BITNET = Architecture(
    _translate,
    prefixes=("model.",),
    layers="layers.",
    top=TOP,
    in_layer=IN_LAYER | {"self_attn.attn_sub_norm": "attention/sub_norm", "mlp.ffn_sub_norm": "ffn/sub_norm"},
    ignored=IGNORED,
)
