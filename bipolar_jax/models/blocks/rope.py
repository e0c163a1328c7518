"""Rotary position embeddings in the half-split layout, with the published ways to extend the context."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.models.config import RopeScaling, TransformerConfig

# Cosines and sines for every position.
Tables = tuple[Float[Array, "#batch length half"], Float[Array, "#batch length half"]]


class TablesByKind[T](NamedTuple):
    """Tables of layers without a window, and of those with one, where their frequencies differ."""

    full: T
    windowed: T


def tables_of_layer[T](tables: T | TablesByKind[T] | None, windowed: Bool[Array, ""] | None) -> T | None:
    """The tables of a layer; `windowed` says whether it has a window, None that no two layers differ."""
    if not isinstance(tables, TablesByKind):
        return tables
    return jax.tree.map(lambda full, other: jnp.where(windowed, other, full), tables.full, tables.windowed)


def rope_frequencies(config: TransformerConfig, room: int = 0) -> tuple[np.ndarray, float]:
    """Rotary frequencies in radians per position, and the factor on cos and sin.

    Source: RoFormer (arXiv 2104.09864) for the base; `RopeScaling` names the others.

    Args:
      config: the model's.
      room: positions of the text, or of the cache that it is written to; "longrope" alone depends on it.

    Returns:
      float64 [num_rotary // 2] frequencies, highest first, and the attention factor.

    Raises:
      ValueError: explicit factors of another count.
    """
    half = config.num_rotary // 2
    base = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "factors":
        return base / np.asarray(scaling.factors), 1.0
    if scaling.kind == "longrope":
        is_long = room > scaling.original_context_length
        return base / np.asarray(scaling.factors if is_long else scaling.short_factors), _longrope_factor(scaling)
    if scaling.kind == "llama3":
        return _llama3_frequencies(base, scaling), 1.0
    return _yarn_frequencies(base, scaling, config)


def _longrope_factor(scaling: RopeScaling) -> float:
    """LongRoPE (arXiv 2402.13753) multiplies cos and sin by it, for short texts too."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context_length))


def _llama3_frequencies(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3's scaling: low frequencies are divided by the factor, high ones kept, those between interpolated."""
    rotations = scaling.original_context_length * base / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return keep * base + (1 - keep) * base / scaling.factor


def _yarn_frequencies(base: np.ndarray, scaling: RopeScaling, config: TransformerConfig) -> tuple[np.ndarray, float]:
    """NTK-by-parts (arXiv 2309.00071, section 3.2), the ramp over the frequency index as in the authors' code."""
    half = len(base)

    def index_of(rotations: float) -> float:
        wavelengths = scaling.original_context_length / (rotations * 2 * math.pi)
        return half * math.log(wavelengths) / math.log(config.rope_theta)

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), config.num_rotary - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0
    return ramp * base / scaling.factor + (1 - ramp) * base, attention_factor


def rope_tables(
    config: TransformerConfig, positions: Int[Array, "batch length"], room: int = 0
) -> Tables | TablesByKind[Tables]:
    """Cosine and sine tables, float32, for the given positions; `room` as `rope_frequencies` takes it."""
    if config.window_rope_theta is not None:
        same = dataclasses.replace(config, window_rope_theta=None)
        local = dataclasses.replace(same, rope_theta=config.window_rope_theta, rope_scaling=None)
        return TablesByKind(rope_tables(same, positions, room), rope_tables(local, positions))
    frequencies, attention_factor = rope_frequencies(config, room)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(
    x: Float[Array, "batch length heads head_dim"], tables: Tables
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (i, i + half) of every head, half the tables' width, and leaves the rest; in float32."""
    cos, sin = (table[:, :, None, :] for table in tables)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)
