"""BLOOM (Le Scao et al. 2022, arXiv 2211.05100) as Hugging Face stores it."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.json_fields import Fields


def _translate(fields: Fields) -> dict[str, Any]:
    if fields.flag("apply_residual_connection_post_layernorm", False):
        raise ValueError(
            f"{fields.source} has apply_residual_connection_post_layernorm true: "
            "only residuals from before the norm are supported"
        )
    # Published configs use either name.
    hidden = fields.size("n_embed" if fields.get("n_embed") else "hidden_size")
    heads = fields.size("num_attention_heads" if fields.get("num_attention_heads") else "n_head")
    layers = fields.size("num_hidden_layers" if fields.get("num_hidden_layers") else "n_layer")
    return dict(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(hidden // heads, 1),
        ffn_size=4 * hidden,
        # ALiBi has no limit; this is the trained length.
        context_length=fields.size("seq_length", 2048),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        positions="alibi",
        ffn="gelu",
        qkv_bias=True,
        linear_bias=True,
        embed_norm=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


BLOOM = Architecture(
    _translate,
    prefixes=("transformer.",),
    layers="h.",
    top={
        "word_embeddings": "embed",
        "word_embeddings_layernorm": "embed_norm",
        "ln_f": "final_norm",
        "lm_head": "lm_head",
    },
    in_layer={
        "input_layernorm": "attention_norm",
        "self_attention.query_key_value": ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
        "self_attention.dense": "attention/o_proj",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn/up_proj",
        "mlp.dense_4h_to_h": "ffn/down_proj",
    },
)
