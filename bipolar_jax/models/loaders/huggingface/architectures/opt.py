"""OPT (Zhang et al. 2022, arXiv 2205.01068) as Hugging Face stores it."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.json_fields import Fields

# Position p is row p + 2 of the stored table; the first two rows are unused.
_POSITION_OFFSET = 2


def _translate(fields: Fields) -> dict[str, Any]:
    path = fields.source
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if not fields.flag("do_layer_norm_before", True):
        raise ValueError(
            f"{path} has do_layer_norm_before false (as OPT-350m): only norms before each block are supported"
        )
    projected = fields.size("word_embed_proj_dim", hidden)
    if projected != hidden:
        raise ValueError(
            f"{path} has word_embed_proj_dim {projected} and hidden_size {hidden} (as OPT-350m): "
            "projected embeddings are not supported"
        )
    activation = fields.get("activation_function", "relu")
    if activation != "relu":
        raise ValueError(f"{path} has activation_function {activation!r}, supported is 'relu'")
    for name, supported in (("enable_bias", True), ("layer_norm_elementwise_affine", True)):
        if fields.flag(name, supported) != supported:
            raise ValueError(f"{path} has {name} false: only OPT with all biases and scales is supported")
    if fields.flag("_remove_final_layer_norm", False):
        raise ValueError(f"{path} has _remove_final_layer_norm true: only OPT with a final norm is supported")
    return dict(
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(hidden // heads, 1),
        ffn_size=fields.size("ffn_dim"),
        context_length=fields.size("max_position_embeddings", 2048),
        norm="layer",
        positions="learned",
        ffn="relu",
        qkv_bias=True,
        linear_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


OPT = Architecture(
    _translate,
    prefixes=("model.",),
    layers="decoder.layers.",
    top={
        "decoder.embed_tokens": "embed",
        "decoder.embed_positions": "positions",
        "decoder.final_layer_norm": "final_norm",
        "lm_head": "lm_head",
    },
    in_layer={
        "self_attn_layer_norm": "attention_norm",
        "self_attn.q_proj": "attention/q_proj",
        "self_attn.k_proj": "attention/k_proj",
        "self_attn.v_proj": "attention/v_proj",
        "self_attn.out_proj": "attention/o_proj",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn/up_proj",
        "fc2": "ffn/down_proj",
    },
    first_rows={"decoder.embed_positions": _POSITION_OFFSET},
)
