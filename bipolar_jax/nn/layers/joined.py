"""Joins packed linear layers that have the same input into one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from bipolar_jax.nn.layers.linear import Linear, sizes, without_training
from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.packing import BipolarNumbers, PreparedArray

# The axis n of the leaves of a packed kernel, [..., planes, n, words] and [..., n, groups].
_COLUMNS_AXIS = -2


def joined(layers: Sequence[Linear]) -> Linear:
    """One layer whose output is the concatenation of the layers' outputs.

    The joined layer quantizes and reads its input once. Every column keeps its codes and scales, so the outputs are
    unchanged, but for the roundings of training, see `without_training`. Also joins stacks of layers, column by column.

    Raises:
      ValueError: the layers differ in precision, dtype, contracted size, backend, in how they clip activations, in the
        order of their inputs, or in whether they have offsets, integer groups or a bias; or they contract other axes
        than the last.
    """
    first, *_ = layers = [without_training(layer) for layer in layers]
    if general := [layer for layer in layers if not layer.contracts_last_axis]:
        raise ValueError(f"layers that contract other axes than the last are not joined: axis is {general[0].axis}")
    kernels = [layer.kernel.get_value() for layer in layers]
    if any(isinstance(kernel, PreparedArray) for kernel in kernels):
        raise ValueError("layers whose weights are laid out for a GPU are not joined: join them before")
    for layer, kernel in zip(layers, kernels, strict=True):
        for name, expected, found in (
            ("precision", first.precision, layer.precision),
            ("training", first.trained, layer.trained),
            ("dtype", _dtypes(first), _dtypes(layer)),
            ("backend", first.implementation, layer.implementation),
            ("contracted size", kernels[0].contracted_size, kernel.contracted_size),
            ("kind of weights", type(kernels[0]).__name__, type(kernel).__name__),
            ("form of scales", *(getattr(each, "form", None) for each in (kernels[0], kernel))),
            ("offsets", *(jax.eval_shape(_offset, each) is not None for each in (kernels[0], kernel))),
            ("integer groups", kernels[0].groups is not None, kernel.groups is not None),
            ("bias", first.bias is not None, layer.bias is not None),
            ("order of inputs", first.order is not None, layer.order is not None),
        ):
            if expected != found:
                raise ValueError(
                    f"layers to be joined differ: {name} is {expected} in one and {found} in another; "
                    "join only layers that agree in it"
                )
    if first.order is not None and not all(_same(first.order[...], layer.order[...]) for layer in layers[1:]):
        raise ValueError("layers to be joined read their inputs in different orders; join only layers that share one")
    result = nnx.clone(first)
    result.out_features = sum(math.prod(sizes(layer.out_features)) for layer in layers)
    result.kernel = Packed(_side_by_side(kernels))
    if first.bias is not None:
        result.bias = nnx.Param(jnp.concatenate([layer.bias[...] for layer in layers], axis=-1))
    return result


@jax.jit
def _side_by_side(kernels: list[BipolarNumbers]) -> BipolarNumbers:
    """One program for all leaves: each by itself takes as long to compile."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=_COLUMNS_AXIS), *kernels)


def _offset(kernel: BipolarNumbers) -> Array | None:
    return kernel.offset


def _same(order: Array, other: Array) -> bool:
    """Whether two orders of inputs are known to be equal."""
    if order is other:
        return True
    return not any(isinstance(each, jax.core.Tracer) for each in (order, other)) and bool(jnp.array_equal(order, other))


def _dtypes(layer: Linear) -> tuple:
    dtypes = (layer.dtype, layer.param_dtype, layer.preferred_element_type)
    return tuple(None if dtype is None else jnp.dtype(dtype).name for dtype in dtypes)
