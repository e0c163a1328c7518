"""The feed-forward blocks of a decoder layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax import ops
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT, Layer
from bipolar_jax.kernels.semantics.hadamard import LARGEST_WARP_BLOCK
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.models.blocks.norm import Norm, as_prologue, make_norm, project, project_onto
from bipolar_jax.models.blocks.step import Step, by_xla, post_norm_step, product_step, shared_implementation
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.nn import fuses
from bipolar_jax.nn.layers.packed import CountedModule
from bipolar_jax.ops import Activation, Hadamard
from bipolar_jax.ops.matmul import vary_alike

# The functions of gates that kernels compute, by `TransformerConfig.ffn`; XLA squares those of "relu2glu".
_GATES = {"swiglu": "silu", "geglu": "gelu"}
_FUNCTIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def _linear(config: TransformerConfig, param_dtype, rngs: nnx.Rngs):
    return functools.partial(
        nnx.Linear, use_bias=config.linear_bias, param_dtype=param_dtype, dtype=param_dtype, rngs=rngs
    )


def _rotation(config: TransformerConfig) -> Hadamard | None:
    """The rotation of the input of down."""
    return None if config.rotation is None else config.rotation.ffn


def _down_steps(down: nnx.Module, rotation: Hadamard | None, x: Any) -> list[Step]:
    """The product with the weights of down, and the rotation of its input: within its quantizer, or before it."""
    if rotation is None:
        return [product_step("down", down, x)]
    if fuses(down) and down.precision.a_bits is not None and rotation.within_warp:
        return [product_step("rotation, down", down, x)]
    reason = f"of the input of down, in blocks of {rotation.block}: a quantizer rotates powers of two up to "
    reason += f"{LARGEST_WARP_BLOCK}, before integer products"
    return [Step("rotation", by_xla("float32 sums", reason)), product_step("down", down, x)]


def gate_activation(ffn: str) -> Activation | None:
    """The gates of a feed-forward block as kernels compute them; None for others."""
    return Activation(_GATES[ffn], gated=True) if ffn in _GATES else None


class GatedMLP(CountedModule):
    """x + down(function(gate(norm(x))) * up(norm(x))); Shazeer 2020, arXiv 2002.05202.

    The function is silu ("swiglu"), tanh-approximated gelu ("geglu") or relu squared ("relu2glu"; arXiv 2504.12285).
    Where the config says so, the input of down is normalized or rotated first; a `post_norm` takes the output of down.
    The inner width is the config's `ffn_size`, unless another is given: that of one of several experts.
    """

    def __init__(
        self, config: TransformerConfig, ffn_size: int | None = None, *, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        linear, ffn_size = _linear(config, param_dtype, rngs), config.ffn_size if ffn_size is None else ffn_size
        self.rotation = _rotation(config)
        self.gate_proj = linear(config.hidden_size, ffn_size)
        self.up_proj = linear(config.hidden_size, ffn_size)
        self.down_proj = linear(ffn_size, config.hidden_size)
        self.gate = gate_activation(config.ffn)
        if config.sub_norms:
            self.sub_norm = make_norm("rms", config, ffn_size, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length hidden"], norm: Norm, post_norm: Norm | None = None
    ) -> Float[Array, "batch length hidden"]:
        if hasattr(self, "sub_norm"):
            return project_onto(x, self.down_proj, self._gated(x, norm), as_prologue(self.sub_norm), post_norm)
        if self.gates_in_quantizer(x):
            gate = dataclasses.replace(self.gate, rotation=self.rotation)
            return project_onto(x, self.down_proj, self.gate_up_proj(x, as_prologue(norm)), gate, post_norm)
        if self.is_joined and self.rotation is None and post_norm is None:
            try:
                return _one_bit_down(*vary_alike((x, norm, self.gate_up_proj, self.down_proj)), self.gate)
            except Unsupported:
                pass
        return project_onto(x, self.down_proj, self._gated(x, norm), self.rotation, post_norm)

    def _gated(self, x: Float[Array, "batch length hidden"], norm: Norm) -> Float[Array, "batch tokens inner"]:
        """function(gate(norm(x))) * up(norm(x))."""
        if self.is_joined and self.gate is not None:
            return self.gate_up_proj(x, as_prologue(norm), activation=self.gate)
        if self.is_joined:
            gate, up = jnp.split(self.gate_up_proj(x, as_prologue(norm)), 2, axis=-1)
        else:
            gate, up = project([self.gate_proj, self.up_proj], norm, x)
        return self.function(gate) * up

    def function(self, gate: Float[Array, "..."]) -> Float[Array, "..."]:
        """What multiplies up."""
        return jnp.square(jax.nn.relu(gate)) if self.gate is None else _FUNCTIONS[self.gate.function](gate)

    def explain(self, x: Float[Array, "batch length hidden"], norm: Norm, post_norm: Norm | None = None) -> list[Step]:
        """What `__call__` runs for these operands."""
        down = _down_steps(self.down_proj, self.rotation, x)
        if post_norm is not None:
            down.append(post_norm_step("down"))
        if not self.is_joined:
            return [product_step("gate", self.gate_proj, x), product_step("up", self.up_proj, x), *down]
        reason = None
        if hasattr(self, "sub_norm"):
            reason = "a norm follows the gates"
        elif post_norm is not None:
            reason = "a norm follows down, before the sum"
        elif self.rotation is None and not self.gates_in_quantizer(x):
            try:
                implementation, operands = _one_bit_operands(x, norm, self.gate_up_proj, self.down_proj, self.gate)
                return [Step("gate/up, down", ops.explain(ops.feed_forward, *operands, implementation=implementation))]
            except Unsupported as unsupported:
                reason = str(unsupported)
        return [product_step("gate/up", self.gate_up_proj, x, reason), *down]

    @property
    def is_joined(self) -> bool:
        """Whether gate and up are one layer, see `join_projections`."""
        return hasattr(self, "gate_up_proj")

    def gates_in_quantizer(self, x: Float[Array, "*batch hidden"]) -> bool:
        """Whether gate and up are joined, and the quantizer of `down` computes the gates, not the product before it.

        The epilogue halves what the product writes and what is read again. The product of few tokens has no activation
        in its epilogue on Hopper, and the quantizer that follows computes it on the way. That of weights which are laid
        out for the activation has one.
        """
        if self.gate is None or not self.is_joined:
            return False
        gated = getattr(self.gate_up_proj.kernel.get_value(), "gated", False)
        return x.size // x.shape[-1] <= FEW_TOKENS_LIMIT and fuses(self.down_proj) and not gated


def _gated_up(x, norm, gate_up, down, gate):
    return project_onto(x, down, gate_up(x, as_prologue(norm), activation=gate))


@jax.custom_vjp
def _one_bit_down(x, norm, gate_up, down, gate):
    """The numbers of `_gated_up` by the fused operation. Raises Unsupported as `_one_bit_operands` and that do."""
    implementation, operands = _one_bit_operands(x, norm, gate_up, down, gate)
    return ops.feed_forward(*operands, implementation=implementation).reshape(x.shape)


def _one_bit_operands(x, norm: Norm, gate_up: Any, down: Any, gate: Activation | None) -> tuple[str, tuple]:
    """The backend and the operands of `ops.feed_forward`.

    Raises:
      Unsupported: layers that are not packed; float activations, or more than one bit for `down`; squared gates.
    """
    if gate is None:
        raise Unsupported("the fused feed-forward block has no gates that are squared")
    if not (fuses(gate_up) and fuses(down)):
        raise Unsupported("the fused feed-forward block takes packed layers")
    if down.k_axes is not None:
        raise Unsupported("the rows of down are cut over devices, which add their sums")
    if gate_up.precision.a_bits is None or down.precision.a_bits != 1:
        raise Unsupported("the fused feed-forward block takes integer activations, of one bit for down")
    rows = x.reshape(-1, x.shape[-1])
    first, second = (
        Layer(
            layer.kernel.get_value(),
            layer.precision.a_format,
            None if layer.bias is None else jnp.asarray(layer.bias[...]),
        )
        for layer in (gate_up, down)
    )
    return shared_implementation((gate_up, down)), (rows, first, second, as_prologue(norm), gate, rows)


def _forward(*operands):
    return _one_bit_down(*operands), operands


def _backward(operands, cotangent):
    """The gradient of `_gated_up`, which is computed once more for it."""
    _, pull_back = jax.vjp(_gated_up, *operands)
    return pull_back(cotangent)


_one_bit_down.defvjp(_forward, _backward)


class MLP(CountedModule):
    """x + down(activation(up(norm(x)))).

    ReLU in OPT (arXiv 2205.01068), GELU by its tanh formula in BLOOM (arXiv 2211.05100). The input of down is rotated
    first where the config says so.
    """

    def __init__(self, config: TransformerConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        linear = _linear(config, param_dtype, rngs)
        self.rotation = _rotation(config)
        self.activation = Activation(config.ffn)
        self.up_proj = linear(config.hidden_size, config.ffn_size)
        self.down_proj = linear(config.ffn_size, config.hidden_size)

    def __call__(
        self, x: Float[Array, "batch length hidden"], norm: Norm, post_norm: Norm | None = None
    ) -> Float[Array, "batch length hidden"]:
        (up,) = project([self.up_proj], norm, x)
        activation = dataclasses.replace(self.activation, rotation=self.rotation)
        return project_onto(x, self.down_proj, up, activation, post_norm)

    def explain(self, x: Float[Array, "batch length hidden"], norm: Norm, post_norm: Norm | None = None) -> list[Step]:
        """What `__call__` runs for these operands."""
        del norm
        last = [] if post_norm is None else [post_norm_step("down")]
        return [product_step("up", self.up_proj, x), *_down_steps(self.down_proj, self.rotation, x), *last]
