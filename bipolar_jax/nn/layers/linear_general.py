"""Linear layer over any axes, with packed weights."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.stateful_dot_general import Trained
from bipolar_jax.ops.contraction import Contraction, DimensionNumbers
from bipolar_jax.quantize import Precision


class LinearGeneral(nnx.Module):
    """`nnx.LinearGeneral`, or an `nnx.Linear` trained with `DotGeneral`, with weights in bipolar-INT.

    Computes what the float layer computes with that `DotGeneral`, to the bit: the same
    products, in the same dtype, and the bias after them.

    Attributes:
      kernel: `Packed` array of logical shape (*stack, *batch, k, n): all contracted axes as
        one, all output axes as one.
      bias: `nnx.Param` (*batch, *out_features), or None.
      dot_general: the activations' bits and the backend.
      precision: what the kernel was quantized to, and the activation bits.
      learned_steps: whether its scales are step sizes that were trained, which have no offsets.
      batch_shape, in_features, out_features: sizes of the float kernel's axes.
      axis, batch_axis: those of the input that are contracted, and shared with the kernel.
    """

    def __init__(self, layer: nnx.LinearGeneral | nnx.Linear, trained: Trained):
        """Packs the kernel of a float layer, which may be a stack of layers; shares its bias.

        Args:
          layer: the float layer.
          trained: how to quantize it.

        Raises:
          ValueError: as `quantize`.
        """
        self.axis, batch_axis, self.in_features, self.out_features = axes_of(layer)
        self.batch_axis = tuple(batch_axis)
        self.batch_shape = tuple(batch_axis.values())
        kernel = layer.kernel[...]
        # The dtype that the layer computes in is what its DotGeneral is given.
        kernel = kernel if layer.dtype is None else kernel.astype(layer.dtype)
        self.kernel = Packed(trained.dot_general.pack(folded_kernel(layer, kernel), trained.step_size))
        self.bias = nnx.data(layer.bias)
        self.dot_general = trained.dot_general
        self.learned_steps = trained.step_size is not None
        self.dtype = layer.dtype
        self.kernel_dtype = layer.kernel[...].dtype
        self.promote_dtype = layer.promote_dtype
        self.preferred_element_type = layer.preferred_element_type

    @classmethod
    def from_float(
        cls, layer: nnx.LinearGeneral | nnx.Linear, precision: Precision | None = None, *, implementation: str = "auto"
    ) -> LinearGeneral:
        """The packed counterpart of a float layer, as it was trained if it has a `DotGeneral`.

        Args:
          layer: may be a stack of layers.
          precision: what to quantize to; None for layers that were trained.
          implementation: "auto" leaves trained layers the backend they were trained with.

        Raises:
          ValueError: a precision other than the layer was trained with, or none for a layer
            that was not trained.
        """
        trained = Trained.of(layer)
        if trained is None and precision is None:
            raise ValueError("the layer was not trained with DotGeneral: give a precision")
        trained = trained or Trained(DotGeneral.of(precision))
        if precision is not None and trained.dot_general.precision != precision:
            raise ValueError(
                f"it was trained at {trained.dot_general.precision}: without rules, layers are packed as they were "
                "trained"
            )
        return cls(layer, trained.on(implementation))

    @property
    def precision(self) -> Precision:
        return self.dot_general.precision

    def __call__(self, inputs: Float[Array, "..."], out_sharding: Any = None) -> Float[Array, "..."]:
        """As the float layer. Raises as `bipolar_jax.matmul`."""
        bias = None if self.bias is None else self.bias[...]
        inputs, _, bias = self.promote_dtype((inputs, jnp.zeros((), self.kernel_dtype), bias), dtype=self.dtype)
        numbers, bias_shape = self._layout(inputs)
        kernel_shape = (*self.batch_shape, *self.in_features, *self.out_features)
        contraction = Contraction.of(inputs.shape, kernel_shape, numbers)
        dtype = self.preferred_element_type or inputs.dtype
        y = self.dot_general.multiply_packed(
            inputs, self.kernel.get_value(), contraction, dtype, out_sharding=out_sharding
        )
        return y if bias is None else y + jnp.reshape(bias, bias_shape)

    def _layout(self, inputs: Array) -> tuple[DimensionNumbers, tuple[int, ...]]:
        """Dimension numbers, and the shape in which the bias fits the output."""
        axis = tuple(sorted(i % inputs.ndim for i in self.axis))
        batch_axis = tuple(sorted(i % inputs.ndim for i in self.batch_axis))
        batch = tuple(range(len(batch_axis)))
        contracting = tuple(range(len(batch), len(batch) + len(axis)))
        kept = [inputs.shape[i] if i in batch_axis else 1 for i in range(inputs.ndim) if i not in axis]
        return ((axis, contracting), (batch_axis, batch)), (*kept, *self.out_features)


def axes_of(layer: nnx.LinearGeneral | nnx.Linear) -> tuple[tuple, dict, tuple[int, ...], tuple[int, ...]]:
    """Contracted axes of the input; its batch axes with their sizes; sizes contracted and kept."""
    if isinstance(layer, nnx.Linear):
        return (-1,), {}, (layer.in_features,), (layer.out_features,)
    return tuple(layer.axis), dict(layer.batch_axis), tuple(layer.in_features), tuple(layer.out_features)


def folded_kernel(layer: nnx.LinearGeneral | nnx.Linear, kernel: Array) -> Float[Array, "*batch k n"]:
    """Contracted axes as one and output axes as one; axes of a stack of layers lead."""
    _, batch_axis, in_features, out_features = axes_of(layer)
    k, n = math.prod(in_features), math.prod(out_features)
    stack = kernel.shape[: kernel.ndim - len(batch_axis) - len(in_features) - len(out_features)]
    return kernel.reshape(*stack, *batch_axis.values(), k, n)
