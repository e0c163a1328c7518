"""Flax NNX layers with packed weights."""

from bipolar_jax.nn.dot_general import DotGeneral
from bipolar_jax.nn.embed import Embed
from bipolar_jax.nn.joined import joined
from bipolar_jax.nn.linear import Linear
from bipolar_jax.nn.packed import Packed
from bipolar_jax.nn.quantize_model import quantize_model

__all__ = ["DotGeneral", "Embed", "Linear", "Packed", "joined", "quantize_model"]
