"""Flax layers with packed weights, low-bit products for training, and conversion of models."""

from bipolar_jax.nn.convert.integer_groups import ConversionReport, ConvertedLayer, with_integer_groups
from bipolar_jax.nn.convert.quantization_aware import quantization_aware
from bipolar_jax.nn.convert.quantize_linen import PackedLinen
from bipolar_jax.nn.convert.quantize_model import quantize_model
from bipolar_jax.nn.convert.summary import LayerSummary, layer_summaries, summary
from bipolar_jax.nn.layers.einsum import Einsum
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.joined import joined
from bipolar_jax.nn.layers.linear import Linear, fuses, without_training
from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.nn.training.bit_schedule import BitSchedule
from bipolar_jax.nn.training.distillation import distillation_loss
from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.linen_dot_general import LinenDotGeneral
from bipolar_jax.nn.training.optimizer import adamw
from bipolar_jax.nn.training.quantized_einsum import QuantizedEinsum
from bipolar_jax.nn.training.stateful_dot_general import StatefulDotGeneral

__all__ = [
    "BitSchedule",
    "ConversionReport",
    "ConvertedLayer",
    "DotGeneral",
    "Einsum",
    "Embed",
    "LayerSummary",
    "Linear",
    "LinenDotGeneral",
    "Packed",
    "PackedLinen",
    "QuantizedEinsum",
    "StatefulDotGeneral",
    "adamw",
    "distillation_loss",
    "fuses",
    "joined",
    "layer_summaries",
    "quantization_aware",
    "quantize_model",
    "summary",
    "with_integer_groups",
    "without_training",
]
