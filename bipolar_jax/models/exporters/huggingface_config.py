"""config.json of a Transformer of the Llama family, as transformers reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

from bipolar_jax.models.config import RopeScaling, TransformerConfig

# Fields that models of one architecture may have of any value; `stream_ends` folds rotations, or refuses them.
_FREE = {
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "context_length"),
    *("rope_theta", "rope_scaling", "norm_eps", "tie_embeddings", "bos_id", "eos_ids", "rotation"),
}


def huggingface_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The fields of config.json for a Llama, a Mistral with windows, a Qwen2 (biases) or a Qwen3 model (QK-norm).

    Args:
      config: the model's config.
      dtype: of the float parameters.

    Raises:
      ValueError: a model that none of them computes, such as OPT, BLOOM or Gemma.
    """
    kind = model_type(config)
    windows = {"mistral": {"sliding_window": config.window}, "qwen3": {"use_sliding_window": False}}
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **windows.get(kind, {}),
        **token_ids(config),
    }


def model_type(config: TransformerConfig) -> str:
    """The architecture of `loaders.huggingface.config.ARCHITECTURES` that computes the model.

    Raises:
      ValueError: none of those that are exported does.
    """
    kinds = {"qwen2": config.qkv_bias, "qwen3": config.qk_norm, "mistral": config.window is not None}
    found = [kind for kind, has in kinds.items() if has] or ["llama"]
    others = [f for f in dataclasses.fields(config) if f.name not in _FREE | {"qkv_bias", "qk_norm", "window"}]
    other = [f.name for f in others if getattr(config, f.name) != f.default]
    if other or len(found) > 1:
        other = other or ["qkv_bias", "qk_norm", "window"]
        raise ValueError(
            "only models of the Llama family are exported: RMSNorm, rope, SwiGLU and no biases; this one has "
            f"{', '.join(f'{name}={getattr(config, name)!s:.40}' for name in other)}"
        )
    return found[0]


def token_ids(config: TransformerConfig) -> dict[str, Any]:
    """The fields of the first and the last tokens of texts, in config.json and generation_config.json."""
    return {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None}


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind in ("factors", "longrope"):
        raise ValueError("RoPE with a factor for every frequency has no form in config.json that all readers share")
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = scaling.original_context_length
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    return fields
