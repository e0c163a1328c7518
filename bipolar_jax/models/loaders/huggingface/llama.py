"""Llama, Mistral and Qwen2 as Hugging Face stores them."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.rope import rope_config

# Defaults of transformers for absent fields.
_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32}
_DEFAULT_WINDOW = 4096  # Mistral and Qwen2
_DEFAULT_MAX_WINDOW_LAYERS = 28  # Qwen2: as many layers at the bottom attend to all positions


def _translate(fields: Fields) -> dict[str, Any]:
    model_type = fields.get("model_type")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    context = fields.size("max_position_embeddings", _DEFAULT_CONTEXT.get(model_type))
    _refuse_unsupported(fields)
    _refuse_window(fields, model_type, context)
    # null is one key head for each query head; an absent field is not.
    kv_heads = heads if "num_key_value_heads" in fields.values else _DEFAULT_KV_HEADS.get(model_type, heads)
    return dict(
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", kv_heads),
        head_dim=fields.size("head_dim", max(hidden // heads, 1)),
        ffn_size=fields.size("intermediate_size"),
        context_length=context,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        # Qwen2 has these biases, but no field for them.
        qkv_bias=model_type == "qwen2",
        **rope_config(fields, context),
    )


def _refuse_unsupported(fields: Fields) -> None:
    """Raises ValueError for features that the Transformer does not compute."""
    path = fields.source
    activation = fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise ValueError(f"{path} has hidden_act {activation!r:.60}, supported is 'silu'")
    if fields.flag("attention_bias", False):
        raise ValueError(f"{path} has attention_bias true, which adds a bias to o_proj too: that is not supported")
    if fields.flag("mlp_bias", False):
        raise ValueError(f"{path} has mlp_bias true: biases in the feed-forward block are not supported")


def _refuse_window(fields: Fields, model_type: str, context: int) -> None:
    """Raises ValueError if a layer attends to fewer positions than the context, as transformers reads the fields."""
    kinds = fields.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise fields.wrong("layer_types", kinds, 'a list of "full_attention" and "sliding_attention"')
    if model_type == "llama":
        return
    window = fields.size("sliding_window") if fields.get("sliding_window") is not None else None
    if "sliding_window" not in fields.values:
        window = _DEFAULT_WINDOW
    if model_type == "qwen2":
        if not fields.flag("use_sliding_window", False):
            return  # Qwen2 configs have sliding_window even if it is disabled
        # Layers from this one on have a window, unless layer_types says which.
        first = fields.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        if type(first) is not int:
            raise fields.wrong("max_window_layers", first, "an integer")
        uses_window = "sliding_attention" in kinds if kinds else first < fields.size("num_hidden_layers")
        window = window if uses_window else None
    if window is not None and window < context:
        raise ValueError(
            f"{fields.source} attends to a sliding window of {window} of {context} positions: "
            "only full attention is supported"
        )


LLAMA = Architecture(
    _translate,
    prefix="model.",
    layers="layers.",
    top={"embed_tokens": "embed", "norm": "final_norm", "lm_head": "lm_head"},
    in_layer={
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention/q_proj",
        "self_attn.k_proj": "attention/k_proj",
        "self_attn.v_proj": "attention/v_proj",
        "self_attn.o_proj": "attention/o_proj",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn/gate_proj",
        "mlp.up_proj": "ffn/up_proj",
        "mlp.down_proj": "ffn/down_proj",
    },
    # Old checkpoints store these frequencies, which follow from the config.
    ignored=("rotary_emb.inv_freq",),
)
