"""The feed-forward blocks of a decoder layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.norm import Norm, as_prologue, project, project_onto
from bipolar_jax.nn import Linear
from bipolar_jax.ops import Activation

# Gates and what they belong to are worth finishing where the product has them in registers, which halves what it
# writes and what is read again. Not for few tokens: those products leave it to a kernel of its own on Hopper, and the
# quantizer that follows does it on the way.
_FEW_TOKENS = 64


def _linear(config: TransformerConfig, param_dtype, rngs: nnx.Rngs):
    return functools.partial(
        nnx.Linear, use_bias=config.linear_bias, param_dtype=param_dtype, dtype=param_dtype, rngs=rngs
    )


class SwiGLU(nnx.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        linear = _linear(config, param_dtype, rngs)
        self.gate_proj = linear(config.hidden_size, config.ffn_size)
        self.up_proj = linear(config.hidden_size, config.ffn_size)
        self.down_proj = linear(config.ffn_size, config.hidden_size)

    def __call__(self, x: Float[Array, "batch length hidden"], norm: Norm) -> Float[Array, "batch length hidden"]:
        if hasattr(self, "gate_up_proj"):  # see `join_projections`
            gate = Activation("silu", gated=True)
            if x.size // x.shape[-1] <= _FEW_TOKENS and isinstance(self.down_proj, Linear):
                return project_onto(x, self.down_proj, self.gate_up_proj(x, as_prologue(norm)), gate)
            return project_onto(x, self.down_proj, self.gate_up_proj(x, as_prologue(norm), activation=gate))
        gate, up = project([self.gate_proj, self.up_proj], norm, x)
        return project_onto(x, self.down_proj, jax.nn.silu(gate) * up)


class MLP(nnx.Module):
    """x + down(activation(up(norm(x)))).

    ReLU in OPT (arXiv 2205.01068), GELU by its tanh formula in BLOOM (arXiv 2211.05100).
    """

    def __init__(self, config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        linear = _linear(config, param_dtype, rngs)
        self.activation = Activation(config.ffn)
        self.up_proj = linear(config.hidden_size, config.ffn_size)
        self.down_proj = linear(config.ffn_size, config.hidden_size)

    def __call__(self, x: Float[Array, "batch length hidden"], norm: Norm) -> Float[Array, "batch length hidden"]:
        (up,) = project([self.up_proj], norm, x)
        if isinstance(self.down_proj, Linear):
            return project_onto(x, self.down_proj, up, self.activation)
        return project_onto(x, self.down_proj, self.activation(up).astype(up.dtype))
