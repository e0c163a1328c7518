"""Configs of published models by name, without weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.expert_config import Experts


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


def _qwen3(
    hidden_size: int, num_layers: int, num_heads: int, ffn_size: int, *, tied: bool, num_kv_heads: int = 8
) -> TransformerConfig:
    """Yang et al. 2025, arXiv 2505.09388; the chat models."""
    return TransformerConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        ffn_size=ffn_size,
        context_length=40960,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        tie_embeddings=tied,
        qk_norm=True,
        bos_id=151643,
        eos_ids=(151645, 151643),
    )


def _qwen3_moe(hidden_size: int, num_layers: int, num_heads: int, ffn_size: int, experts: Experts) -> TransformerConfig:
    """Yang et al. 2025, arXiv 2505.09388; the chat models with experts."""
    dense = _qwen3(hidden_size, num_layers, num_heads, ffn_size, tied=False, num_kv_heads=4)
    return dataclasses.replace(dense, experts=experts)


def _gemma(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, **fields: Any) -> TransformerConfig:
    """What Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786) share."""
    return TransformerConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        norm_eps=1e-6,
        tie_embeddings=True,
        ffn="geglu",
        post_norms=True,
        embed_scale=hidden_size**0.5,
        attention_scale=256**-0.5,
        bos_id=2,
        **fields,
    )


def _gemma2(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_size: int) -> TransformerConfig:
    return _gemma(
        hidden_size,
        num_layers,
        num_heads,
        num_kv_heads,
        vocab_size=256000,
        ffn_size=ffn_size,
        context_length=8192,
        attention_softcap=50.0,
        logit_softcap=30.0,
        window=4096,
        window_layers=tuple(range(0, num_layers, 2)),
        eos_ids=(1,),
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
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, 32, 6144, Experts(128, 8, 768)),
    "qwen3-235b-a22b": _qwen3_moe(4096, 94, 64, 12288, Experts(128, 8, 1536)),
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 9216),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 14336),
    "gemma-3-1b": _gemma(
        1152,
        26,
        4,
        1,
        vocab_size=262144,
        ffn_size=6912,
        context_length=32768,
        rope_theta=1000000.0,
        qk_norm=True,
        window=512,
        window_layers=tuple(layer for layer in range(26) if layer % 6 != 5),
        window_rope_theta=10000.0,
        eos_ids=(1, 106),
    ),
    "phi-3-mini": TransformerConfig(
        vocab_size=32064,
        hidden_size=3072,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        ffn_size=8192,
        context_length=4096,
        window=2047,
        bos_id=1,
        eos_ids=(32000, 32001, 32007),
    ),
    "mistral-7b": TransformerConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=14336,
        context_length=32768,
        window=4096,
        bos_id=1,
        eos_ids=(2,),
    ),
    "mixtral-8x7b": TransformerConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=14336,
        context_length=32768,
        rope_theta=1000000.0,
        bos_id=1,
        eos_ids=(2,),
        experts=Experts(8, 2, 14336),
    ),
    "bitnet-2b": TransformerConfig(
        vocab_size=128256,
        hidden_size=2560,
        num_layers=30,
        num_heads=20,
        num_kv_heads=5,
        head_dim=128,
        ffn_size=6912,
        context_length=4096,
        rope_theta=500000.0,
        tie_embeddings=True,
        ffn="relu2glu",
        sub_norms=True,
        bos_id=128000,
        eos_ids=(128001, 128009),
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
