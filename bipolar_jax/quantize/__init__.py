"""Quantization: real numbers to codes, scales and offsets."""

from bipolar_jax.quantize.fake_quant import fake_quant
from bipolar_jax.quantize.precision import Precision

__all__ = ["Precision", "fake_quant"]
