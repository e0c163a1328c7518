"""Einsum layer with packed weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.nn.layers.dense_layout import leading_axes
from bipolar_jax.nn.layers.packed import PackedModule, folded
from bipolar_jax.nn.layers.promotion import add_bias, compute_dtype
from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.ops.contraction import Contraction
from bipolar_jax.ops.explicit_sharding import merged_to_matrix
from bipolar_jax.packing import BipolarArray, quantize
from bipolar_jax.quantize import Precision


class Einsum(PackedModule):
    """`nnx.Einsum` with bipolar-INT weights, for equations that plainly contract the kernel.

    Each index of the kernel is then one of the input (contracted, or kept as a batch axis) or one of the result only.

    Attributes:
      kernel: `Packed` array of logical shape (*stack, *batch, k, n): the contracted axes are merged
        into k, the axes that only the kernel and the result have into n. `kernel.shape` is that of the float kernel.
      bias: `nnx.Param` of `bias_shape`, or None.
      precision: the precision of the kernel, and the activation bits.
      implementation: the backend of `bipolar_jax.matmul`.
      einsum_str, kernel_shape, bias_shape, dtype, promote_dtype, preferred_element_type: as in Flax.
      param_dtype: dtype of the float kernel.
      trained: the `DotGeneral` of the layer's training, or None.
    """

    def __init__(self, layer: nnx.Einsum, precision: Precision | str | None = None, *, implementation: str = "auto"):
        """Quantizes a float layer, as `from_float` does."""
        if reason := why_not_contracted(layer):
            raise ValueError(reason)
        trained = LayerQuantization.of(layer)
        quantization = LayerQuantization.for_packing(trained, None if precision is None else Precision.of(precision))
        dot_general = quantization.on(implementation).dot_general
        weights = folded_einsum_kernel(layer)
        if trained is None:
            chosen = dot_general.precision
            packed = quantize(weights, chosen.w_bits, -2, chosen.group_size, chosen.calibration, chosen.scales)
        else:
            # In training, the layer casts its kernel to `dtype` before it calls its DotGeneral.
            weights = weights if layer.dtype is None else weights.astype(layer.dtype)
            packed = dot_general.pack(weights, quantization.step_size)
        stack_ndim = layer.kernel.ndim - len(layer.kernel_shape)
        self.kernel = folded(packed, tuple(layer.kernel_shape), packed.ndim - stack_ndim)
        self.bias = nnx.data(layer.bias)
        self.precision = dot_general.precision
        self.implementation = dot_general.implementation
        self.einsum_str = layer.einsum_str
        self.kernel_shape = tuple(layer.kernel_shape)
        self.bias_shape = layer.bias_shape
        self.dtype = layer.dtype
        self.param_dtype = layer.kernel[...].dtype
        self.promote_dtype = layer.promote_dtype
        self.preferred_element_type = layer.preferred_element_type
        self.trained: DotGeneral | None = None if trained is None else dot_general

    @classmethod
    def from_float(
        cls, layer: nnx.Einsum, precision: Precision | str | None = None, *, implementation: str = "auto"
    ) -> Einsum:
        """Quantizes a float layer or a stack of layers; shares its bias.

        Args:
          layer: the float layer; one whose `einsum_op` is of `quantization_aware` or a `QuantizedEinsum` is quantized
            as in training.
          precision, implementation: as for `Linear.from_float`.

        Raises:
          ValueError: an equation that does not plainly contract the kernel, or that the layer gets with each call; an
            `einsum_op` of another library; or as `Linear.from_float`.
        """
        return cls(layer, precision, implementation=implementation)

    def __call__(
        self, inputs: Float[Array, "..."], einsum_str: str | None = None, out_sharding: Any = None
    ) -> Float[Array, "..."]:
        """The einsum of inputs and kernel, plus the bias, in the dtype of Flax's layer.

        Args:
          inputs: activations; a token is all the elements that one output is contracted from.
          einsum_str: must be None, for the packed kernel fits the equation of the layer only.
          out_sharding: sharding of the result, for meshes with Explicit axes.

        Raises:
          ValueError: an `einsum_str`; or as `bipolar_jax.matmul`.
        """
        if einsum_str is not None:
            raise ValueError(f"the kernel is packed for {self.einsum_str!r}: another equation needs the float layer")
        x = jnp.asarray(inputs)
        bias = None if self.bias is None else self.bias[...]
        dtype = compute_dtype(self, x, bias)
        x_axes, kernel_axes, result = _axes(self.einsum_str, x.ndim)
        numbers = _dimension_numbers(x_axes, kernel_axes, result)
        contraction = Contraction.of(x.shape, self.kernel_shape, numbers)
        dot_general = self.trained or DotGeneral.of(self.precision)
        dot_general = dataclasses.replace(dot_general, implementation=self.implementation)
        (_, _), (batch, _) = numbers
        y_axes = [x_axes[i] for i in batch] + [axis for axis in x_axes if axis not in kernel_axes]
        y_axes += [axis for axis in kernel_axes if axis not in x_axes]
        order = [y_axes.index(axis) for axis in result]
        result_dtype = jnp.dtype(self.preferred_element_type or dtype)

        def product(x: Array, kernel: BipolarArray) -> Array:
            return dot_general.multiply_packed(x, kernel, contraction, result_dtype).transpose(order)

        if out_sharding is not None:
            product = jax.sharding.auto_axes(product, out_sharding=out_sharding)
        y = product(x.astype(dtype), self.kernel.get_value())
        if bias is not None:
            sizes = dict(zip(kernel_axes, self.kernel_shape, strict=True))
            y = add_bias(y, bias.astype(dtype).reshape([sizes.get(axis, 1) for axis in result]))
        return y


def folded_einsum_kernel(layer: nnx.Einsum) -> Float[Array, "*batch k n"]:
    """The kernel with its contracted axes merged into k and those of the result alone into n; axes of a stack lead.

    Raises:
      ValueError: a stack on another axis than the first.
    """
    kernel = layer.kernel[...]
    stack = leading_axes("kernel", kernel.shape, layer.kernel_shape)
    x_axes, kernel_axes, result = _axes(layer.einsum_str, 0)
    numbers = _dimension_numbers(x_axes, kernel_axes, result)
    fold = Contraction.of([1] * len(x_axes), layer.kernel_shape, numbers)
    order = (*range(len(stack)), *(len(stack) + axis for axis in fold.w_order))
    (_, contracted), _ = numbers
    return merged_to_matrix(kernel.transpose(order), len(stack) + len(fold.batch), len(contracted))


def why_not_contracted(layer: nnx.Einsum) -> str | None:
    """Why a float layer cannot be packed; None if it can."""
    usual = layer.einsum_op is jnp.einsum or LayerQuantization.of(layer) is not None
    if not usual:
        return f"its einsum_op is {getattr(layer.einsum_op, '__name__', layer.einsum_op)!s}"
    if layer.einsum_str is None:
        return "it gets its equation with each call"
    equation = layer.einsum_str
    inputs, result = equation.split("->")
    x, kernel = inputs.split(",")
    plain = (
        "..." not in kernel
        and ("..." in x) == ("..." in result)
        and all(len(set(axes)) == len(axes) for axes in (_letters(x), kernel, _letters(result)))
        and set(_letters(result)) <= set(_letters(x) + kernel)
        and set(kernel) <= set(_letters(x) + _letters(result))
        and set(_letters(x)) <= set(kernel + _letters(result))
        and bool(set(_letters(x)) & set(kernel) - set(_letters(result)))
    )
    return None if plain else f"{equation!r} does not plainly contract its kernel with the input"


def _letters(axes: str) -> str:
    return axes.replace("...", "")


def _axes(equation: str, x_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """The indices of x, of the kernel and of the result; those that an ellipsis stands for are numbered."""
    inputs, result = equation.split("->")
    x, kernel = inputs.split(",")
    names = [f"axis {i}" for i in range(max(0, x_ndim - len(_letters(x))))]

    def expand(axes: str) -> list[str]:
        before, dots, after = axes.partition("...")
        return [*before, *(names if dots else []), *after]

    return expand(x), list(kernel), expand(result)


def _dimension_numbers(x_axes: Sequence[str], kernel_axes: Sequence[str], result: Sequence[str]):
    """Dimension numbers of `lax.dot_general`, in the order of `QuantizedEinsum`."""
    shared = [axis for axis in x_axes if axis in kernel_axes]
    batch = [axis for axis in shared if axis in result]
    contracted = [axis for axis in shared if axis not in result]
    return tuple(
        tuple(tuple(map(axes.index, names)) for axes in (x_axes, kernel_axes)) for names in (contracted, batch)
    )
