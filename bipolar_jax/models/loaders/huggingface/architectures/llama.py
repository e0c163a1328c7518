"""Llama, Mistral and Qwen2 as Hugging Face stores them, and what other architectures share with them."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.loaders.huggingface.architecture import Architecture
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.layer_types import read_windows, sliding_window
from bipolar_jax.models.loaders.huggingface.rope import rope_config

# Defaults of transformers for absent fields.
_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32}
_DEFAULT_WINDOW = 4096  # Mistral, Qwen2 and Qwen3
_DEFAULT_MAX_WINDOW_LAYERS = 28  # Qwen: as many layers at the bottom attend to all positions

TOP = {"embed_tokens": "embed", "norm": "final_norm", "lm_head": "lm_head"}
IN_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention/q_proj",
    "self_attn.k_proj": "attention/k_proj",
    "self_attn.v_proj": "attention/v_proj",
    "self_attn.o_proj": "attention/o_proj",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn/gate_proj",
    "mlp.up_proj": "ffn/up_proj",
    "mlp.down_proj": "ffn/down_proj",
}
# Old checkpoints store these frequencies, which follow from the config.
IGNORED = ("rotary_emb.inv_freq",)


def _translate(fields: Fields) -> dict[str, Any]:
    model_type = fields.get("model_type")
    context = fields.size("max_position_embeddings", _DEFAULT_CONTEXT.get(model_type))
    refuse_biases(fields)
    shared = shared_fields(fields, context, kv_heads=_DEFAULT_KV_HEADS.get(model_type))
    return dict(
        **shared,
        **rope_config(fields, context),
        **_windows(fields, model_type, context),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        # Qwen2 has these biases, but no field for them.
        qkv_bias=model_type == "qwen2",
    )


def shared_fields(
    fields: Fields, context: int, *, kv_heads: int | None, head_dim: int | None = None, norm_eps: float = 1e-6
) -> dict[str, Any]:
    """Sizes and epsilon, which all architectures after Llama name alike.

    Args:
      fields: config.json.
      context: the model's context length.
      kv_heads, head_dim: where the fields are absent; None is as many key heads as heads, and their share of the hidden
        size.
      norm_eps: likewise.
    """
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    # null is one key head for each query head; an absent field is not.
    kv_heads = heads if kv_heads is None or "num_key_value_heads" in fields.values else kv_heads
    return dict(
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", kv_heads),
        head_dim=fields.size("head_dim", max(hidden // heads, 1) if head_dim is None else head_dim),
        ffn_size=fields.size("intermediate_size"),
        context_length=context,
        norm_eps=fields.number("rms_norm_eps", norm_eps),
    )


def check_activation(fields: Fields, name: str, known: tuple[str, ...]) -> None:
    """Raises ValueError if the activation is none of `known`: names of one function, the first is the default."""
    activation = fields.get(name, known[0])
    if activation not in known:
        raise ValueError(f"{fields.source} has {name} {activation!r:.60}, supported is {known[0]!r}")


def refuse_biases(fields: Fields, activation: tuple[str, ...] = ("silu", "swish")) -> None:
    """Raises ValueError for biases and activations that models after Llama's pattern do not have."""
    check_activation(fields, "hidden_act", activation)
    if fields.flag("attention_bias", False):
        raise ValueError(
            f"{fields.source} has attention_bias true, which adds a bias to o_proj too: that is not supported"
        )
    if fields.flag("mlp_bias", False):
        raise ValueError(f"{fields.source} has mlp_bias true: biases in the feed-forward block are not supported")


def _windows(fields: Fields, model_type: str, context: int) -> dict[str, Any]:
    """The windows of layers, as transformers reads the fields; one of the whole context is none."""
    layers = fields.size("num_hidden_layers")
    if model_type == "qwen2":
        return qwen_windows(fields, context)
    window = None if model_type == "llama" else sliding_window(fields, _DEFAULT_WINDOW, context)
    return read_windows(fields, layers, window)


def qwen_windows(fields: Fields, context: int) -> dict[str, Any]:
    """Those of Qwen2 and Qwen3, which state a window even if it is disabled."""
    layers = fields.size("num_hidden_layers")
    window = sliding_window(fields, _DEFAULT_WINDOW, context) if fields.flag("use_sliding_window", False) else None
    first = fields.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    if type(first) is not int:
        raise fields.wrong("max_window_layers", first, "an integer")
    return read_windows(fields, layers, window, lambda layer: layer >= first)


LLAMA = Architecture(_translate, prefixes=("model.",), layers="layers.", top=TOP, in_layer=IN_LAYER, ignored=IGNORED)
