"""Linear layer over any axes with packed weights, and the layout of such layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.ops.contraction import Contraction, DimensionNumbers
from bipolar_jax.quantize import Precision


class LinearGeneral(nnx.Module):
    """`nnx.LinearGeneral`, or an `nnx.Linear` trained with `DotGeneral`, with bipolar-INT weights.

    Gives the same bits as the float layer with that `DotGeneral`: the same products in the same
    dtype, and the bias added after the cast.

    Attributes:
      kernel: `Packed` array of logical shape (*stack, *batch, k, n): the contracted axes are
        merged into k, the output axes into n.
      bias: `nnx.Param` (*batch, *out_features), or None.
      dot_general: how activations are quantized, and the backend.
      precision: the precision of the kernel, and the activation bits.
      learned_steps: True if the scales are trained step sizes; then there are no offsets.
      batch_shape, in_features, out_features: sizes of the float kernel's axes.
      axis, batch_axis: the contracted axes and the batch axes of the input.
    """

    def __init__(self, layer: nnx.LinearGeneral | nnx.Linear, quantization: LayerQuantization):
        """Packs the kernel of a float layer; shares its bias.

        Args:
          layer: a float layer or a stack of layers.
          quantization: how to quantize it.

        Raises:
          ValueError: as `quantize`.
        """
        self.axis, batch_axis, self.in_features, self.out_features = axes_of(layer)
        self.batch_axis = tuple(batch_axis)
        self.batch_shape = tuple(batch_axis.values())
        kernel = layer.kernel[...]
        # In training, the layer casts its kernel to `dtype` before it calls its DotGeneral.
        kernel = kernel if layer.dtype is None else kernel.astype(layer.dtype)
        self.kernel = Packed(quantization.dot_general.pack(folded_kernel(layer, kernel), quantization.step_size))
        self.bias = nnx.data(layer.bias)
        self.dot_general = quantization.dot_general
        self.learned_steps = quantization.step_size is not None
        self.dtype = layer.dtype
        self.kernel_dtype = layer.kernel[...].dtype
        self.promote_dtype = layer.promote_dtype
        self.preferred_element_type = layer.preferred_element_type

    @classmethod
    def from_float(
        cls, layer: nnx.LinearGeneral | nnx.Linear, precision: Precision | None = None, *, implementation: str = "auto"
    ) -> LinearGeneral:
        """Quantizes a float layer, with its own `DotGeneral` if it was trained with one.

        Args:
          layer: a float layer or a stack of layers.
          precision: the precision to quantize to; may be None for a layer that was trained with
            `DotGeneral`.
          implementation: the backend; "auto" keeps the one that the layer was trained with.

        Raises:
          ValueError: a precision that differs from that of training, or none for a layer that
            was not trained with `DotGeneral`; or as `quantize`.
        """
        quantization = LayerQuantization.for_packing(LayerQuantization.of(layer), precision)
        return cls(layer, quantization.on(implementation))

    @property
    def precision(self) -> Precision:
        """The precision of the kernel, and the activation bits."""
        return self.dot_general.precision

    def __call__(self, inputs: Float[Array, "..."], out_sharding: Any = None) -> Float[Array, "..."]:
        """Computes what the float layer computes, in its dtype. Raises ValueError as `bipolar_jax.matmul`."""
        bias = None if self.bias is None else self.bias[...]
        inputs, _, bias = self.promote_dtype((inputs, jnp.zeros((), self.kernel_dtype), bias), dtype=self.dtype)
        numbers, bias_shape = dense_layout(inputs.shape, self.axis, self.batch_axis, self.out_features)
        kernel_shape = (*self.batch_shape, *self.in_features, *self.out_features)
        contraction = Contraction.of(inputs.shape, kernel_shape, numbers)
        dtype = self.preferred_element_type or inputs.dtype
        y = self.dot_general.multiply_packed(
            inputs, self.kernel.get_value(), contraction, dtype, out_sharding=out_sharding
        )
        return y if bias is None else y + jnp.reshape(bias, bias_shape)


def dense_layout(
    inputs_shape: Sequence[int], axis: Sequence[int], batch_axis: Sequence[int], out_features: Sequence[int]
) -> tuple[DimensionNumbers, tuple[int, ...]]:
    """How a general dense layer contracts its inputs with a kernel [*batch, *in_features, *out_features].

    Args:
      inputs_shape: shape of the inputs.
      axis, batch_axis: the contracted axes and the batch axes of the inputs, which may be negative.
      out_features: sizes of the output axes.

    Returns:
      Dimension numbers of `lax.dot_general`, and the shape that broadcasts the bias to the output.
    """
    ndim = len(inputs_shape)
    axis, batch_axis = (tuple(sorted(i % ndim for i in axes)) for axes in (axis, batch_axis))
    batch = tuple(range(len(batch_axis)))
    contracting = tuple(range(len(batch), len(batch) + len(axis)))
    bias_shape = [inputs_shape[i] if i in batch_axis else 1 for i in range(ndim) if i not in axis]
    return ((axis, contracting), (batch_axis, batch)), (*bias_shape, *out_features)


def axes_of(layer: nnx.LinearGeneral | nnx.Linear) -> tuple[tuple, dict, tuple[int, ...], tuple[int, ...]]:
    """Contracted axes of the input; its batch axes, with their sizes; `in_features`; `out_features`."""
    if isinstance(layer, nnx.Linear):
        return (-1,), {}, (layer.in_features,), (layer.out_features,)
    return tuple(layer.axis), dict(layer.batch_axis), tuple(layer.in_features), tuple(layer.out_features)


def folded_kernel(layer: nnx.LinearGeneral | nnx.Linear, kernel: Array) -> Float[Array, "*batch k n"]:
    """Merges the contracted axes of a kernel into k and the output axes into n; the axes of a stack lead."""
    _, batch_axis, in_features, out_features = axes_of(layer)
    k, n = math.prod(in_features), math.prod(out_features)
    stack = kernel.shape[: kernel.ndim - len(batch_axis) - len(in_features) - len(out_features)]
    return kernel.reshape(*stack, *batch_axis.values(), k, n)
