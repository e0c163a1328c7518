"""How general dense layers contract their inputs with a kernel, and how the kernel folds into a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from bipolar_jax.ops.contraction import DimensionNumbers
from bipolar_jax.ops.explicit_sharding import merged_to_matrix


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
    """Merges the contracted axes of a kernel into k and the output axes into n; the axes of a stack lead.

    Raises:
      ValueError: the last axes of the kernel are not those of one layer, as in a stack on another axis than the first.
    """
    _, batch_axis, in_features, out_features = axes_of(layer)
    one_layer = (*batch_axis.values(), *in_features, *out_features)
    stack = leading_axes("kernel", kernel.shape, one_layer)
    return merged_to_matrix(kernel, len(stack) + len(batch_axis), len(in_features))


def leading_axes(name: str, shape: Sequence[int], one_layer: Sequence[int]) -> tuple[int, ...]:
    """The axes of a stack of layers, which lead. Raises ValueError if the others are not those of one layer."""
    stack = tuple(shape[: len(shape) - len(one_layer)])
    if tuple(shape) != (*stack, *one_layer):
        raise ValueError(
            f"its {name} has shape {tuple(shape)}, where one layer has {tuple(one_layer)}: "
            "the axis of a stack of layers must be the first, nnx.vmap(out_axes=0)"
        )
    return stack
