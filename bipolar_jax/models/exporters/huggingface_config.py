"""config.json of a Transformer of the Llama family, as transformers reads it."""

from __future__ import annotations

from typing import Any

from bipolar_jax.models.config import RopeScaling, TransformerConfig


def huggingface_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The fields of config.json for a Llama, or, with biases of queries, keys and values, a Qwen2 model.

    Args:
      config: the model's config.
      dtype: of the float parameters.

    Raises:
      ValueError: a model that neither computes, such as OPT, BLOOM or one that is rotated at run time.
    """
    if (config.norm, config.positions, config.ffn, config.linear_bias) != ("rms", "rope", "swiglu", False):
        raise ValueError("only models of the Llama family are exported: RMSNorm, rope, SwiGLU and no biases")
    if config.rotation is not None:
        raise ValueError(
            "the model computes rotations at run time, which config.json does not say: export one that is not rotated"
        )
    kind = "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
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
        **token_ids(config),
    }


def token_ids(config: TransformerConfig) -> dict[str, Any]:
    """The fields of the first and the last tokens of texts, in config.json and generation_config.json."""
    return {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None}


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "factors":
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
