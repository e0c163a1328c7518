"""Arbitrary-precision (1 to 8 bit) quantized transformers for JAX."""

from bipolar_jax import compress, interop, models, nn
from bipolar_jax.checkpoint import load, save
from bipolar_jax.format import TERNARY, BipolarFormat
from bipolar_jax.interop import from_qwix, to_qwix
from bipolar_jax.models.inference.explain import explain_model
from bipolar_jax.nn import DotGeneral, quantization_aware, quantize_model, summary
from bipolar_jax.ops import GradientPrecision, explain, lookup, matmul
from bipolar_jax.packing import BipolarArray, from_codes, quantize
from bipolar_jax.packing.cuts import partition_specs, shard
from bipolar_jax.quantize import IntegerGroups, Precision, fake_quant

__version__ = "0.1.0"

__all__ = [
    "TERNARY",
    "BipolarArray",
    "BipolarFormat",
    "DotGeneral",
    "GradientPrecision",
    "IntegerGroups",
    "Precision",
    "compress",
    "explain",
    "explain_model",
    "fake_quant",
    "from_codes",
    "from_qwix",
    "interop",
    "load",
    "lookup",
    "matmul",
    "models",
    "nn",
    "partition_specs",
    "quantization_aware",
    "quantize",
    "quantize_model",
    "save",
    "shard",
    "summary",
    "to_qwix",
]
