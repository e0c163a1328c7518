"""Reads the model's config from the metadata of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bipolar_jax.models.config import MOST_SIZE, RopeScaling, TransformerConfig
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.gguf.architectures import ARCHITECTURES, architecture_fields
from bipolar_jax.models.loaders.gguf.metadata import Metadata

_MOST_UINT32 = 2**32 - 1


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
RopeFactors = dict[str, tuple[float, ...]]


def read_config(metadata: Metadata, tensor_names: set[str], rope_factors: RopeFactors) -> TransformerConfig:
    """Translates the metadata into a config.

    Args:
      metadata: the file's metadata.
      tensor_names: names of the file's tensors, which show tied embeddings and biases of q, k and v.
      rope_factors: values of the tensors named ROPE_TENSORS, those that the file has.

    Raises:
      ValueError: an unsupported architecture or feature, or a missing or invalid key.
    """
    arch = metadata.require(metadata.text("general.architecture"), "general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{metadata.source} has architecture {arch!r:.60}, supported are {', '.join(ARCHITECTURES)}: "
            "choose a model of one of these"
        )
    if metadata.integer("split.count", 1) > 1:
        raise ValueError(
            f"{metadata.source} is one part of a split model: join the parts with llama-gguf-split --merge"
        )

    def size(key: str, default: int | None = None) -> int:
        name = f"{arch}.{key}"
        return metadata.require(metadata.integer(name, default, least=1, most=_MOST_UINT32), name)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    rotary = metadata.integer(f"{arch}.rope.dimension_count", None, least=1)
    head_dim = size("attention.key_length", rotary or max(hidden // heads, 1))
    context = size("context_length")
    partial = rotary is not None and rotary < head_dim and arch == "phi3"
    _refuse_unsupported(metadata, arch, head_dim, head_dim if partial else rotary or head_dim)
    tokens = metadata.array("tokenizer.ggml.tokens", str) or []
    vocab_size = size("vocab_size", len(tokens) or None)
    scaling = _rope_scaling(metadata, arch, context, rope_factors)
    fields = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=size("block_count"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=size("feed_forward_length"),
        context_length=context,
        rope_theta=float(metadata.positive(f"{arch}.rope.freq_base", 10000.0)),
        norm_eps=_norm_eps(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        bos_id=_token_id(metadata, "bos"),
        eos_ids=_eos_ids(metadata),
        rotary_dim=rotary if partial else None,
    )
    fields |= architecture_fields(metadata, arch, fields)
    with errors_name(metadata.source):
        return TransformerConfig(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)


def _refuse_unsupported(metadata: Metadata, arch: str, head_dim: int, rotary: int) -> None:
    value_dim = metadata.integer(f"{arch}.attention.value_length", head_dim)
    if value_dim != head_dim or rotary != head_dim:
        raise ValueError(
            f"{metadata.source} has {head_dim} key, {value_dim} value and {rotary} rotary dimensions a head: "
            "only models where the three are equal are supported"
        )


def _norm_eps(metadata: Metadata, key: str) -> float:
    """The shortest decimal of the stored float32: 1e-05 instead of 9.999999747378752e-06."""
    value = metadata.require(metadata.positive(key), key)
    return float(str(np.float32(value)))


def _token_id(metadata: Metadata, name: str) -> int | None:
    """The id of the token "bos" or "eos"; SentencePiece has ids for absent keys, as in llama.cpp."""
    is_sentencepiece = metadata.text("tokenizer.ggml.model") == "llama"
    default = {"bos": 1, "eos": 2}[name] if is_sentencepiece else None
    return metadata.integer(f"tokenizer.ggml.{name}_token_id", default)


def _eos_ids(metadata: Metadata) -> tuple[int, ...]:
    """Ids of the end of text, and of the end of a chat turn if the file has one."""
    found = (_token_id(metadata, "eos"), metadata.integer("tokenizer.ggml.eot_token_id"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _rope_scaling(metadata: Metadata, arch: str, context: int, tensors: RopeFactors) -> dict[str, Any] | None:
    """Keyword arguments of RopeScaling, or None without scaling."""
    prefix = f"{arch}.rope.scaling"
    factors, *both = (tensors.get(name, ()) for name in ROPE_TENSORS)
    if any(both):
        return _longrope(metadata, prefix, context, *both)
    factor = metadata.positive(f"{prefix}.factor", metadata.positive(f"{arch}.rope.scale_linear", 1.0))
    # As in llama.cpp, a factor without a type is linear scaling.
    kind = metadata.text(f"{prefix}.type", "linear" if factor != 1 else "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{metadata.source} has RoPE scaling {kind!r:.60}, supported are none, linear, yarn")
    if kind == "none" or (kind == "linear" and factor == 1):
        return dict(kind="factors", factors=factors) if factors else None
    if factors:
        raise ValueError(f"{metadata.source} has both RoPE scaling {kind!r} and rope_freqs.weight: one is supported")
    if kind == "linear":
        return dict(kind="linear", factor=factor)
    # llama.cpp multiplies 0.1 ln(factor) + 1 by this value.
    multiplier = metadata.positive(f"{prefix}.yarn_attn_factor", metadata.positive(f"{prefix}.attn_factor", 1.0))
    return dict(
        kind="yarn",
        factor=factor,
        original_context_length=metadata.integer(f"{prefix}.original_context_length", context, least=1, most=MOST_SIZE),
        beta_fast=metadata.positive(f"{prefix}.yarn_beta_fast", 32.0),
        beta_slow=metadata.positive(f"{prefix}.yarn_beta_slow", 1.0),
        attention_factor=None if multiplier == 1 else multiplier * (0.1 * math.log(factor) + 1.0),
    )


def _longrope(
    metadata: Metadata, prefix: str, context: int, short: tuple[float, ...], long: tuple[float, ...]
) -> dict[str, Any]:
    """That of Phi-3: the file states the factor on cos and sin, and no type."""
    if not (short and long):
        raise ValueError(f"{metadata.source} has short or long RoPE factors, but not both: convert the model again")
    kind = metadata.text(f"{prefix}.type", "longrope")
    if kind not in ("longrope", "none"):
        raise ValueError(f"{metadata.source} has both RoPE scaling {kind!r:.60} and RoPE factors: one is supported")
    original = metadata.integer(f"{prefix}.original_context_length", context, least=2, most=MOST_SIZE)
    return dict(
        kind="longrope",
        factor=max(context / original, 1.0),
        original_context_length=original,
        attention_factor=metadata.positive(f"{prefix}.attn_factor"),
        factors=long,
        short_factors=short,
    )
