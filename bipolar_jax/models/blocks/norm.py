"""The norm that a config asks for, and what layers make of its output."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.nn import Linear
from bipolar_jax.ops import LayerNorm, Prologue, RMSNorm

Norm = nnx.RMSNorm | nnx.LayerNorm


def make_norm(config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs) -> Norm:
    """A norm over the hidden size: arXiv 1910.07467 without, arXiv 1607.06450 with a bias."""
    kind = nnx.RMSNorm if config.norm == "rms" else nnx.LayerNorm
    return kind(
        config.hidden_size,
        epsilon=config.norm_eps,
        use_fast_variance=False,  # mean of squares less square of mean cancels where the mean is large
        param_dtype=param_dtype,
        dtype=param_dtype,
        rngs=rngs,
    )


def project(
    layers: Sequence[nnx.Linear | Linear], norm: Norm, x: Float[Array, "*batch hidden"]
) -> list[Float[Array, "*batch out"]]:
    """What each layer makes of norm(x): packed ones normalize while they quantize, float ones share one norm(x)."""
    normalized = norm(x) if any(not isinstance(layer, Linear) for layer in layers) else None
    prologue = as_prologue(norm)
    return [layer(x, prologue) if isinstance(layer, Linear) else layer(normalized) for layer in layers]


def project_onto(
    residual: Float[Array, "*batch out"],
    layer: nnx.Linear | Linear,
    x: Float[Array, "*batch columns"],
    prologue: Prologue | None = None,
) -> Float[Array, "*batch out"]:
    """residual + layer(x): packed layers add it while they finish their product, and take a prologue."""
    return layer(x, prologue, residual) if isinstance(layer, Linear) else residual + layer(x)


def as_prologue(norm: Norm) -> RMSNorm | LayerNorm:
    """The norm as `bipolar_jax.matmul` takes it."""
    if isinstance(norm, nnx.RMSNorm):
        return RMSNorm(norm.scale[...], norm.epsilon)
    return LayerNorm(norm.scale[...], norm.bias[...], norm.epsilon)
