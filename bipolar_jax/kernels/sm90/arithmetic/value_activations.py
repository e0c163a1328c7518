"""Activation functions of `core.ptx` values, for single threads; see `activations`.

Apart from `activations`, so that the kernels of products do not import the instructions of single threads.
"""

from __future__ import annotations

import math

from bipolar_jax.kernels.sm90.arithmetic.activations import GELU_CUBIC, GELU_SLOPE
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value


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
