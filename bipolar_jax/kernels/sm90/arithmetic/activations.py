"""Activation functions on the device. `kernels.semantics.prologue` defines them; the three forms here compute them.

- `apply`: arrays, in the epilogue of a product: no division, which Mosaic has no fast instruction for.
- `ACCURATE`: arrays, in the decode step, whose numbers are few: division and tanh.
- `OF_VALUES`: values of `core.ptx`, in the row quantizer: one power of two and one reciprocal.

gelu is the tanh formula of arXiv 1606.08415, section 2: x (1 + tanh(u)) / 2 = x logistic(2 u) with
u = GELU_SLOPE (x + GELU_CUBIC x^3).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bipolar_jax.kernels.semantics.prologue import Function
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value

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


def _logistic_product(x: Value, argument: Value, factor: float) -> Value:
    """x logistic(factor * argument), with a relative error of about 2^-20."""
    power = ptx.exp2(ptx.multiply(argument, ptx.float32(-factor * math.log2(math.e))))
    return ptx.multiply(x, ptx.reciprocal(ptx.add(power, ptx.float32(1))))


def _silu(x: Value) -> Value:
    return _logistic_product(x, x, 1.0)


def _gelu(x: Value) -> Value:
    cubic = ptx.fma(ptx.multiply(ptx.multiply(x, x), ptx.float32(GELU_CUBIC)), x, x)
    return _logistic_product(x, cubic, 2 * GELU_SLOPE)


def _relu(x: Value) -> Value:
    return ptx.as_float(ptx.extreme("max", "f32", ptx.as_word(x), ptx.int32(0)))


OF_VALUES = {"silu": _silu, "gelu": _gelu, "relu": _relu}
