"""Flax layers with packed weights, and what trains them."""

from bipolar_jax.nn.bit_schedule import BitSchedule
from bipolar_jax.nn.distillation import distillation_loss
from bipolar_jax.nn.dot_general import DotGeneral
from bipolar_jax.nn.embed import Embed
from bipolar_jax.nn.joined import joined
from bipolar_jax.nn.linear import Linear
from bipolar_jax.nn.linear_general import LinearGeneral
from bipolar_jax.nn.linen_dot_general import LinenDotGeneral
from bipolar_jax.nn.packed import Packed
from bipolar_jax.nn.quantization_aware import quantization_aware
from bipolar_jax.nn.quantize_linen import PackedLinen
from bipolar_jax.nn.quantize_model import quantize_model
from bipolar_jax.nn.quantized_einsum import QuantizedEinsum
from bipolar_jax.nn.stateful_dot_general import StatefulDotGeneral

__all__ = [
    "BitSchedule",
    "DotGeneral",
    "Embed",
    "Linear",
    "LinearGeneral",
    "LinenDotGeneral",
    "Packed",
    "PackedLinen",
    "QuantizedEinsum",
    "StatefulDotGeneral",
    "distillation_loss",
    "joined",
    "quantization_aware",
    "quantize_model",
]
