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
    """`nnx.Linear` with bipolar-INT weights: y = x @ kernel + bias.

    A stack of layers, with a leading axis on every array, can be scanned or vmapped over.

    Attributes:
      kernel: `Packed` array of logical shape (in_features, out_features).
      bias: `nnx.Param` of shape (out_features,), or None.
      precision: the precision of the kernel, and the activation bits.
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
        """Initializes a float kernel as `nnx.Linear` does and quantizes it. Raises ValueError as `quantize`."""
        kernel = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel = Packed(quantize(kernel, precision.w_bits, -2, precision.group_size, precision.calibration))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), jnp.float32))
        self.precision = precision
        self.implementation = implementation

    @classmethod
    def from_float(cls, layer: nnx.Linear, precision: Precision, *, implementation: str = "auto") -> Linear:
        """Quantizes a float layer or a stack of layers; shares its bias. Raises ValueError as `quantize`."""
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
        """Computes x @ kernel + bias, optionally with fused operations before and after it.

        Args:
          x: activations; columns is `in_features`, or the input width of the prologue.
          prologue: a norm or an activation function of x, computed while x is quantized.
          residual: added to the output; it has the output's dtype.
          activation: applied to the product and the bias; a gated one halves the width of the
            output.

        Returns:
          The output, in x's dtype.

        Raises:
          ValueError: as `bipolar_jax.matmul`.
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
