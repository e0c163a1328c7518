"""Several packed layers that read the same input, as one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.layers.packed import Packed

# Of every leaf of a packed kernel [..., bits, n, words] or [..., n, groups].
_COLUMNS_AXIS = -2


def joined(layers: Sequence[Linear]) -> Linear:
    """The layer whose output is theirs, one after the other: activations are quantized, and read, once.

    Every column keeps its bits and scales, so its numbers stay the same. Stacks of layers join as layers do.

    Raises:
      ValueError: the layers differ in precision, contracted size, backend, or in what has offsets or a bias.
    """
    first = layers[0]
    kernels = [layer.kernel.get_value() for layer in layers]
    for layer, kernel in zip(layers, kernels, strict=True):
        for name, mine, others in (
            ("precision", first.precision, layer.precision),
            ("backend", first.implementation, layer.implementation),
            ("contracted size", kernels[0].contracted_size, kernel.contracted_size),
            ("offsets", kernels[0].offset is not None, kernel.offset is not None),
            ("bias", first.bias is not None, layer.bias is not None),
        ):
            if mine != others:
                raise ValueError(f"only layers alike can be joined: {name} is {mine} in one and {others} in another")
    whole = nnx.clone(first)
    whole.kernel = Packed(jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=_COLUMNS_AXIS), *kernels))
    if first.bias is not None:
        whole.bias = nnx.Param(jnp.concatenate([layer.bias[...] for layer in layers], axis=-1))
    return whole
