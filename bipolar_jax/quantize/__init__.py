"""Quantization: real numbers to codes, scales and offsets."""

from bipolar_jax.quantize.fake_quant import fake_quant
from bipolar_jax.quantize.integer_groups import IntegerGroups
from bipolar_jax.quantize.precision import Precision

__all__ = ["IntegerGroups", "Precision", "fake_quant"]
