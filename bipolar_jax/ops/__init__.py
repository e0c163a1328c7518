"""Validated operations over the backends: differentiable products, and fused operations for inference."""

from bipolar_jax.kernels.semantics.hadamard import Hadamard, hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, Prologue, RMSNorm
from bipolar_jax.ops.explain import Explanation, explain
from bipolar_jax.ops.fused import decode_attention, decode_layers, decode_rotation_block, feed_forward, prompt_heads
from bipolar_jax.ops.lookup import lookup
from bipolar_jax.ops.matmul import matmul
from bipolar_jax.ops.trainable_matmul import GradientPrecision, trainable_matmul

__all__ = [
    "Activation",
    "Explanation",
    "GradientPrecision",
    "Hadamard",
    "LayerNorm",
    "Prologue",
    "RMSNorm",
    "decode_attention",
    "decode_layers",
    "decode_rotation_block",
    "explain",
    "feed_forward",
    "hadamard",
    "lookup",
    "matmul",
    "prompt_heads",
    "trainable_matmul",
]
