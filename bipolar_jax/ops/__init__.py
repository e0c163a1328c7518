"""Validated, differentiable operations over whatever backend serves them."""

from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, Prologue, RMSNorm
from bipolar_jax.ops.explain import Explanation, explain
from bipolar_jax.ops.lookup import lookup
from bipolar_jax.ops.matmul import matmul
from bipolar_jax.ops.trainable_matmul import GradientPrecision, trainable_matmul

__all__ = [
    "Activation",
    "Explanation",
    "GradientPrecision",
    "LayerNorm",
    "Prologue",
    "RMSNorm",
    "explain",
    "lookup",
    "matmul",
    "trainable_matmul",
]
