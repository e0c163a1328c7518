"""Linear layer with packed weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.ops import Activation, Prologue, matmul
from bipolar_jax.packing import quantize
from bipolar_jax.quantize import Precision

_default_kernel_init = nnx.initializers.lecun_normal()
_default_bias_init = nnx.initializers.zeros_init()


class Linear(nnx.Module):
    """`nnx.Linear` with weights in bipolar-INT: y = x @ kernel + bias.

    A stack of such layers (a leading axis on every array) may be scanned or vmapped over.

    Attributes:
      kernel: `Packed` array of logical shape (in_features, out_features).
      bias: `nnx.Param` of shape (out_features,), or None.
      precision: what the kernel was quantized to, and the activation bits.
      implementation: the backend of `bipolar_jax.matmul`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        precision: Precision,
        use_bias: bool = True,
        kernel_init: Any = _default_kernel_init,
        bias_init: Any = _default_bias_init,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        """Draws a float kernel as `nnx.Linear` does and quantizes it."""
        kernel = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel = Packed(quantize(kernel, precision.w_bits, -2, precision.group_size, precision.calibration))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), jnp.float32))
        self.precision = precision
        self.implementation = implementation

    @classmethod
    def from_float(cls, layer: nnx.Linear, precision: Precision, *, implementation: str = "auto") -> Linear:
        """The packed counterpart of a float layer, which may be a stack of layers; shares its bias."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            precision=precision,
            use_bias=False,
            kernel_init=lambda *_: layer.kernel[...],
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )
        packed.bias = nnx.data(layer.bias)
        return packed

    def __call__(
        self,
        x: Float[Array, "*batch columns"],
        prologue: Prologue | None = None,
        residual: Float[Array, "*batch out"] | None = None,
        activation: Activation | None = None,
    ) -> Float[Array, "*batch out"]:
        """Output in x's dtype. Raises as `bipolar_jax.matmul`.

        Args:
          x: `in_features` numbers a token, or as many as the prologue makes `in_features` of.
          prologue: a norm or an activation function of x, computed while x is quantized.
          residual: added to the output, in whose dtype it is.
          activation: of the product, of two parts of it if gated: the output is half as wide.
        """
        return matmul(
            x,
            self.kernel.get_value(),
            self.precision.a_bits,
            bias=None if self.bias is None else self.bias[...],
            prologue=prologue,
            residual=residual,
            activation=activation,
            implementation=self.implementation,
        )
