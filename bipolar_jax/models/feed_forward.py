"""The feed-forward blocks of a decoder layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.models.config import TransformerConfig


def _tanh_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": _tanh_gelu}


def _linear(config: TransformerConfig, param_dtype, rngs: nnx.Rngs):
    return functools.partial(
        nnx.Linear, use_bias=config.linear_bias, param_dtype=param_dtype, dtype=param_dtype, rngs=rngs
    )


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        linear = _linear(config, param_dtype, rngs)
        self.gate_proj = linear(config.hidden_size, config.ffn_size)
        self.up_proj = linear(config.hidden_size, config.ffn_size)
        self.down_proj = linear(config.ffn_size, config.hidden_size)

    def __call__(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length hidden"]:
        if hasattr(self, "gate_up_proj"):  # see `join_projections`
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(jax.nn.silu(gate) * up)


class MLP(nnx.Module):
    """down(activation(up(x))): ReLU in OPT (arXiv 2205.01068), GELU by its tanh formula in BLOOM (arXiv 2211.05100)."""

    def __init__(self, config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        linear = _linear(config, param_dtype, rngs)
        self.activation = _ACTIVATIONS[config.ffn]
        self.up_proj = linear(config.hidden_size, config.ffn_size)
        self.down_proj = linear(config.ffn_size, config.hidden_size)

    def __call__(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length hidden"]:
        return self.down_proj(self.activation(self.up_proj(x)))
