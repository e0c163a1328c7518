"""Joins packed linear layers that have the same input into one layer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.layers.packed import Packed

# The axis n of the leaves of a packed kernel, [..., planes, n, words] and [..., n, groups].
_COLUMNS_AXIS = -2


def joined(layers: Sequence[Linear]) -> Linear:
    """One layer whose output is the concatenation of the layers' outputs.

    The joined layer quantizes and reads its input once. Every column keeps its codes and scales, so the outputs are
    unchanged. Also joins stacks of layers, column by column.

    Raises:
      ValueError: the layers differ in precision, contracted size, backend, or in whether they have offsets or a bias.
    """
    first = layers[0]
    kernels = [layer.kernel.get_value() for layer in layers]
    for layer, kernel in zip(layers, kernels, strict=True):
        for name, expected, found in (
            ("precision", first.precision, layer.precision),
            ("backend", first.implementation, layer.implementation),
            ("contracted size", kernels[0].contracted_size, kernel.contracted_size),
            ("offsets", kernels[0].offset is not None, kernel.offset is not None),
            ("bias", first.bias is not None, layer.bias is not None),
        ):
            if expected != found:
                raise ValueError(
                    f"layers to be joined differ: {name} is {expected} in one and {found} in another; "
                    "join only layers that agree in it"
                )
    result = nnx.clone(first)
    result.kernel = Packed(jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=_COLUMNS_AXIS), *kernels))
    if first.bias is not None:
        result.bias = nnx.Param(jnp.concatenate([layer.bias[...] for layer in layers], axis=-1))
    return result
