"""Norms, and linear layers applied to their output: packed layers take the norm as a prologue."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.nn import Linear, fuses
from bipolar_jax.ops import LayerNorm, Prologue, RMSNorm

Norm = nnx.RMSNorm | nnx.LayerNorm


def make_norm(
    kind: str, config: TransformerConfig, size: int | None = None, *, param_dtype=jnp.float32, rngs: nnx.Rngs
) -> Norm:
    """A norm: "rms", RMSNorm (arXiv 1910.07467), or "layer", LayerNorm (arXiv 1607.06450).

    Args:
      kind: "rms" or "layer".
      config: has the epsilon.
      size: numbers that are normalized together; None is the hidden size.
      param_dtype: of the gain, and of the output.
      rngs: as all modules take them; gains start as ones.
    """
    norm = nnx.RMSNorm if kind == "rms" else nnx.LayerNorm
    return norm(
        config.hidden_size if size is None else size,
        epsilon=config.norm_eps,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
        param_dtype=param_dtype,
        dtype=param_dtype,
        rngs=rngs,
    )


def normalize(norm: Norm, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
    """norm(x), computed in float32, in the norm's dtype.

    Flax's own norms of 16-bit floats promote dtypes implicitly, which `jax_numpy_dtype_promotion="strict"` refuses.
    """
    return as_prologue(norm)(x).astype(norm.dtype)


def project(
    layers: Sequence[nnx.Linear | Linear], norm: Norm, x: Float[Array, "*batch hidden"]
) -> list[Float[Array, "*result out"]]:
    """Each layer's output for norm(x): packed layers normalize while they quantize, float layers share one norm(x).

    The output has x's tokens, or with `Linear.token_axes` those of all devices.
    """
    normalized = normalize(norm, x) if any(not fuses(layer) for layer in layers) else None
    prologue = as_prologue(norm)
    return [layer(x, prologue) if fuses(layer) else layer(normalized) for layer in layers]


def project_onto(
    residual: Float[Array, "*result out"],
    layer: nnx.Linear | Linear,
    x: Float[Array, "*batch columns"],
    prologue: Prologue | None = None,
    post_norm: Norm | None = None,
) -> Float[Array, "*result out"]:
    """residual + layer(prologue(x)); packed layers compute all of it with their product.

    With a `post_norm` it is residual + post_norm(layer(prologue(x))), whose norm and sum follow the product.
    """
    if post_norm is not None:
        out = layer(x, prologue) if fuses(layer) else layer(x if prologue is None else prologue(x).astype(x.dtype))
        return residual + normalize(post_norm, out)
    if fuses(layer):
        return layer(x, prologue, residual)
    return residual + layer(x if prologue is None else prologue(x).astype(x.dtype))


def as_prologue(norm: Norm) -> RMSNorm | LayerNorm:
    """The norm as a prologue of `bipolar_jax.matmul`."""
    if isinstance(norm, nnx.RMSNorm):
        return RMSNorm(norm.scale[...], norm.epsilon)
    return LayerNorm(norm.scale[...], norm.bias[...], norm.epsilon)
