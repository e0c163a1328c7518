"""Rotary position embeddings in the half-split layout, with the published ways to extend the context."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bipolar_jax.models.config import RopeScaling, TransformerConfig

# Cosines and sines for every position.
Tables = tuple[Float[Array, "#batch length half"], Float[Array, "#batch length half"]]


def rope_frequencies(config: TransformerConfig) -> tuple[np.ndarray, float]:
    """Rotary frequencies in radians per position, and the factor on cos and sin.

    Source: RoFormer (arXiv 2104.09864) for the base; `RopeScaling` names the others.

    Returns:
      float64 [head_dim // 2] frequencies, highest first, and the attention factor.

    Raises:
      ValueError: explicit factors whose count is not head_dim // 2.
    """
    half = config.head_dim // 2
    base = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "factors":
        if len(scaling.factors) != half:
            raise ValueError(
                f"RoPE has {len(scaling.factors)} explicit factors; head_dim={config.head_dim} needs {half}"
            )
        return base / np.asarray(scaling.factors), 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(base, scaling), 1.0
    return _yarn_frequencies(base, scaling, config)


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
    high = min(math.ceil(index_of(scaling.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0
    return ramp * base / scaling.factor + (1 - ramp) * base, attention_factor


def rope_tables(config: TransformerConfig, positions: Int[Array, "batch length"]) -> Tables:
    """Cosine and sine tables, float32, for the given positions."""
    frequencies, attention_factor = rope_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(
    x: Float[Array, "batch length heads head_dim"], tables: Tables
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (i, i + head_dim // 2) of every head; computes in float32."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
