"""Llama, Mistral and Qwen2 as Hugging Face stores them."""

from __future__ import annotations

import math
from typing import Any

from bipolar_jax.models.config import RopeScaling
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.json_fields import Fields


def _translate(fields: Fields) -> dict[str, Any]:
    model_type = fields.get("model_type")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    context = fields.size("max_position_embeddings")
    _refuse_unsupported(fields, model_type, context)
    rope = _rope_fields(fields)
    scaling = _rope_scaling(rope, context)
    with errors_name(fields.source):
        rope_scaling = RopeScaling(**scaling) if scaling else None
    return dict(
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", max(hidden // heads, 1)),
        ffn_size=fields.size("intermediate_size"),
        context_length=context,
        rope_theta=rope.number("rope_theta", 10000.0),
        rope_scaling=rope_scaling,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        # Qwen2 has these biases, but no field for them.
        qkv_bias=model_type == "qwen2",
    )


def _refuse_unsupported(fields: Fields, model_type: str, context: int) -> None:
    """Raises ValueError for features that the Transformer does not compute."""
    path = fields.source
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{path} has hidden_act {activation!r}, supported is 'silu'")
    if fields.flag("attention_bias", False):
        raise ValueError(f"{path} has attention_bias true, which adds a bias to o_proj too: that is not supported")
    if fields.flag("mlp_bias", False):
        raise ValueError(f"{path} has mlp_bias true: biases in the feed-forward block are not supported")
    # Qwen2 configs have sliding_window even if it is disabled.
    uses_window = fields.flag("use_sliding_window", False) if model_type == "qwen2" else model_type == "mistral"
    window = fields.get("sliding_window")
    if uses_window and (model_type == "qwen2" or (window is not None and window < context)):
        raise ValueError(
            f"{path} attends to a sliding window of {window} of {context} positions: only full attention is supported"
        )


def _rope_fields(fields: Fields) -> Fields:
    """The RoPE fields of either form: rope_parameters (new), or rope_scaling beside rope_theta (old)."""
    rope = fields.nested("rope_parameters") if fields.get("rope_parameters") else fields.nested("rope_scaling")
    shared = {name: fields.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    return Fields({**{k: v for k, v in shared.items() if v is not None}, **rope.values}, fields.source)


def _rope_scaling(rope: Fields, context: int) -> dict[str, Any] | None:
    """Keyword arguments of RopeScaling, or None without scaling."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.number("partial_rotary_factor", 1.0) != 1:
        raise ValueError(f"{rope.source} has a partial_rotary_factor: only rotation of whole heads is supported")
    if kind in ("default", "none"):
        return None
    if kind == "linear":
        return dict(kind="linear", factor=rope.number("factor"))
    original = rope.size("original_max_position_embeddings", context)
    if kind == "llama3":
        return dict(
            kind="llama3",
            factor=rope.number("factor"),
            original_context_length=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind != "yarn":
        raise ValueError(f"{rope.source} has RoPE scaling {kind!r}, supported are default, linear, llama3, yarn")
    if not rope.flag("truncate", True):
        raise ValueError(f"{rope.source} has YaRN with truncate false: only the truncated band limits are supported")
    factor = rope.number("factor")
    return dict(
        kind="yarn",
        factor=factor,
        original_context_length=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float | None:
    """attention_factor, or DeepSeek's ratio of mscale and mscale_all_dim, or None (derived from `factor`)."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None
    numerator, denominator = (0.1 * rope.number(name) * math.log(factor) + 1.0 for name in ("mscale", "mscale_all_dim"))
    return numerator / denominator


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
