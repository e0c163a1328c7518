"""The norm that a config asks for."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from bipolar_jax.models.config import TransformerConfig


def make_norm(config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
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
