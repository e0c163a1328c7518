"""The feed-forward blocks of a decoder layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.kernels import sm90
from bipolar_jax.kernels.backend import Layer
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.norm import Norm, as_prologue, project, project_onto
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.nn import Linear
from bipolar_jax.ops import Activation
from bipolar_jax.ops.matmul import check_operands, vary_alike
from bipolar_jax.quantize.precision import activation_format

# Gates and what they belong to are worth finishing where the product has them in registers, which halves what it
# writes and what is read again. Not for few tokens: those products leave it to a kernel of its own on Hopper, and the
# quantizer that follows does it on the way.
_FEW_TOKENS = 64
_GATE = Activation("silu", gated=True)


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
            if x.size // x.shape[-1] <= _FEW_TOKENS and isinstance(self.down_proj, Linear):
                return project_onto(x, self.down_proj, self.gate_up_proj(x, as_prologue(norm)), _GATE)
            return _of_prompts(x, norm, self.gate_up_proj, self.down_proj)
        gate, up = project([self.gate_proj, self.up_proj], norm, x)
        return project_onto(x, self.down_proj, jax.nn.silu(gate) * up)


def _of_prompts(
    x: Float[Array, "batch length hidden"], norm: Norm, gate_up: Linear, down: nnx.Linear | Linear
) -> Float[Array, "batch length hidden"]:
    """SwiGLU of joined layers; where `down` takes one bit, on Hopper GPUs the product before it leaves no more."""
    try:
        return _by_signs(*vary_alike((x, norm, gate_up, down)))
    except Unsupported:
        return _by_layers(x, norm, gate_up, down)


def _by_layers(x, norm, gate_up, down):
    return project_onto(x, down, gate_up(x, as_prologue(norm), activation=_GATE))


@jax.custom_vjp
def _by_signs(x, norm, gate_up, down):
    """The same numbers. Raises Unsupported where layers are not packed, or as `sm90.feed_forward`."""
    if not all(isinstance(layer, Linear) and layer.implementation in ("auto", "sm90") for layer in (gate_up, down)):
        raise Unsupported("signs leave a product of packed layers for another")
    if gate_up.precision.a_bits is None or down.precision.a_bits != 1:
        raise Unsupported("signs leave a product of integers for one of one-bit tokens")
    prologue, rows = as_prologue(norm), x.reshape(-1, x.shape[-1])
    up, down = (
        Layer(
            layer.kernel.get_value(),
            activation_format(layer.precision.a_bits),
            None if layer.bias is None else jnp.asarray(layer.bias[...]),
        )
        for layer in (gate_up, down)
    )
    check_operands(rows, *up, prologue, activation=_GATE)
    check_operands(jax.ShapeDtypeStruct((rows.shape[0], up.w.shape[-1] // 2), x.dtype), *down, residual=rows)
    return sm90.feed_forward(rows, up, down, prologue, _GATE, rows).reshape(x.shape)


def _forward(*operands):
    return _by_signs(*operands), operands


def _backward(operands, cotangent):
    """That of the layers, which are computed once more for it."""
    _, pull_back = jax.vjp(_by_layers, *operands)
    return pull_back(cotangent)


_by_signs.defvjp(_forward, _backward)


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
