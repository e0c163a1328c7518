"""Changes of basis of a linear layer's arrays, computed in float32.

A layer computes x @ kernel + bias. Each function returns the arrays of the layer that does the same in another basis:
of its input, if what comes before is changed likewise, or of its output, if what comes after is.
Sources: SliceGPT (arXiv 2401.15024, section 3) for norms, QuaRot (arXiv 2404.00456, section 4) for rotations.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.ops import Hadamard


class Affine(NamedTuple):
    """The arrays of a linear layer, float32; no bias is None."""

    kernel: Float[Array, "k n"]
    bias: Float[Array, " n"] | None


def fold_gain(layer: Affine, gain: Float[Array, " k"], shift: Float[Array, " k"] | None = None) -> Affine:
    """Takes over x * gain + shift, which a norm does to its output.

    Raises:
      ValueError: a shift for a layer without a bias.
    """
    bias = layer.bias
    if shift is not None:
        if bias is None:
            raise ValueError("a norm with a bias precedes a layer without one: give the layer a bias of zeros first")
        bias = bias + jnp.einsum("k,kn->n", shift, layer.kernel, precision="highest")
    return Affine(layer.kernel * gain[:, None], bias)


def centre_outputs(layer: Affine) -> Affine:
    """Leaves out the mean of the outputs, which a LayerNorm that follows would."""
    bias = None if layer.bias is None else centre(layer.bias)
    return Affine(centre(layer.kernel), bias)


def rotate_inputs(layer: Affine, rotation: Hadamard) -> Affine:
    """The layer for inputs x @ R: its kernel is R.T @ kernel."""
    return layer._replace(kernel=rotation.rotate(layer.kernel.T).T)


def rotate_outputs(layer: Affine, rotation: Hadamard) -> Affine:
    """The layer with outputs y @ R: its kernel is kernel @ R, its bias bias @ R."""
    bias = None if layer.bias is None else rotation.rotate(layer.bias)
    return Affine(rotation.rotate(layer.kernel), bias)


def centre(rows: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
    """The rows without their mean."""
    return rows - jnp.mean(rows, axis=-1, keepdims=True)
