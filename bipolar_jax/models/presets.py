"""Configs of published models by name, without weights."""

from __future__ import annotations

from bipolar_jax.models.config import TransformerConfig


def _llama2(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_size: int) -> TransformerConfig:
    """Touvron et al. 2023, arXiv 2307.09288."""
    return TransformerConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        ffn_size=ffn_size,
        context_length=4096,
        bos_id=1,
        eos_ids=(2,),
    )


def _smollm2(
    hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_size: int, rope_theta: float
) -> TransformerConfig:
    """Ben Allal et al. 2025, arXiv 2502.02737; the base models."""
    return TransformerConfig(
        vocab_size=49152,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        ffn_size=ffn_size,
        context_length=8192,
        rope_theta=rope_theta,
        tie_embeddings=True,
        bos_id=0,
        eos_ids=(0,),
    )


# From each model's published config.json.
_PRESETS = {
    "llama-2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama-3-8b": TransformerConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=14336,
        context_length=8192,
        rope_theta=500000.0,
        bos_id=128000,
        eos_ids=(128001,),
    ),
    "opt-6.7b": TransformerConfig(
        vocab_size=50272,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_size=16384,
        context_length=2048,
        tie_embeddings=True,
        qkv_bias=True,
        norm="layer",
        positions="learned",
        ffn="relu",
        linear_bias=True,
        bos_id=2,
        eos_ids=(2,),
    ),
    "bloom-7b1": TransformerConfig(
        vocab_size=250880,
        hidden_size=4096,
        num_layers=30,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_size=16384,
        context_length=2048,
        tie_embeddings=True,
        qkv_bias=True,
        norm="layer",
        positions="alibi",
        ffn="gelu",
        linear_bias=True,
        embed_norm=True,
        bos_id=1,
        eos_ids=(2,),
    ),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536, 100000.0),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560, 100000.0),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, 130000.0),
    "qwen2.5-0.5b": TransformerConfig(
        vocab_size=151936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        ffn_size=4864,
        context_length=32768,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        tie_embeddings=True,
        qkv_bias=True,
        bos_id=151643,
        eos_ids=(151643,),
    ),
    "qwen2.5-7b": TransformerConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        ffn_size=18944,
        context_length=131072,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        qkv_bias=True,
        bos_id=151643,
        eos_ids=(151643,),
    ),
}


def preset(name: str) -> TransformerConfig:
    """The config of a published model, such as "llama-2-7b".

    Raises:
      ValueError: unknown name; the message lists all names.
    """
    if name not in _PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(_PRESETS)}")
    return _PRESETS[name]
