"""Layers that stand in for packed ones while the blocks of a model are calibrated, so that precisions share programs.

They multiply numbers where packed layers multiply codes: the same products, but sums are float32 sums, which differ
from a packed layer's in their last bits. A packed layer compiles anew for each number of bits, size of groups and kind
of scales; a rounded one only for each format of activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.compress.hessians import dequantized_tokens
from bipolar_jax.compress.site_inputs import StandIn, replace_layer
from bipolar_jax.format import BipolarFormat
from bipolar_jax.nn.compressible import layer_at
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.straight_through import straight_through


class RoundedLinear(StandIn):
    """Computes what the packed layer in place of a float one does, by a float product.

    Attributes:
      layer: the float layer, an `nnx.Linear` or `nnx.LinearGeneral` over the last axes of its input.
      numbers: the rounded kernel as a matrix, float32 [k, n].
      a_format: the grid of the activations; None leaves them float.
    """

    def __init__(self, layer: nnx.Module, numbers: Float[Array, "k n"], a_format: BipolarFormat | None):
        super().__init__(layer)
        self.numbers = nnx.Param(numbers)
        self.a_format = a_format

    def __call__(self, inputs: Float[Array, "..."], **options: Any) -> Float[Array, "..."]:
        """The product and the bias, in the shape and dtype of layer(inputs)."""
        numbers = self.numbers[...]
        put_out = jax.eval_shape(lambda x: self.layer(x, **options), inputs)
        exact = inputs.reshape(-1, len(numbers)).astype(jnp.float32)
        tokens = straight_through(dequantized_tokens(jax.lax.stop_gradient(exact), self.a_format), exact)
        y = jnp.matmul(tokens, numbers, precision=jax.lax.Precision.HIGHEST)
        if self.layer.bias is not None:
            y = y + self.layer.bias[...].astype(jnp.float32).reshape(1, -1)
        return y.reshape(put_out.shape).astype(put_out.dtype)


@jax.jit
def numbers_of_kernels(kernels: list[BipolarArray]) -> list[Float[Array, "k n"]]:
    """The numbers of packed kernels, float32."""
    return [kernel.dequantize() for kernel in kernels]


def with_rounded_layers(
    block: nnx.Module, numbers: Mapping[str, Float[Array, "k n"]], a_formats: Mapping[str, BipolarFormat | None]
) -> nnx.Module:
    """A copy of the block with a `RoundedLinear` in place of the float layers of these paths."""
    block = nnx.clone(block)
    for name, matrix in numbers.items():
        replace_layer(block, name, RoundedLinear(layer_at(block, name), matrix, a_formats[name]))
    return block
