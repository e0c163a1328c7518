"""Activation functions on the device. `kernels.semantics.prologue` defines them; three forms compute them.

- `apply`: arrays, in the epilogue of a product: no division, which Mosaic has no fast instruction for.
- `ACCURATE`: arrays, in the decode step, whose numbers are few: division and tanh.
- `value_activations.OF_VALUES`: values of `core.ptx`, in the row quantizer: one power of two and one reciprocal.

gelu is the tanh formula of arXiv 1606.08415, section 2: x (1 + tanh(u)) / 2 = x logistic(2 u) with
u = GELU_SLOPE (x + GELU_CUBIC x^3).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bipolar_jax.kernels.semantics.prologue import Function

GELU_SLOPE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def apply(name: Function, x: Array) -> Array:
    """The function of every element, float32; silu and gelu as x logistic(t)."""
    if name == "relu":
        return jnp.maximum(x, 0.0)
    t = x if name == "silu" else x * (2 * GELU_SLOPE + GELU_CUBIC * (2 * GELU_SLOPE) * (x * x))
    # 1 / y as the square of 1 / sqrt(y), in place of a division.
    root = lax.rsqrt(1.0 + jnp.exp(-t))
    return x * (root * root)


ACCURATE = {
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + jnp.tanh(GELU_SLOPE * (x + GELU_CUBIC * x * x * x))),
    "relu": lambda x: jnp.maximum(x, 0.0),
}
