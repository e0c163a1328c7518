"""Validated, differentiable operations over whatever backend serves them."""

from bipolar_jax.kernels.prologue import Activation, LayerNorm, Prologue, RMSNorm
from bipolar_jax.ops.explain import Explanation, explain
from bipolar_jax.ops.lookup import lookup
from bipolar_jax.ops.matmul import matmul

__all__ = [
    "Activation",
    "Explanation",
    "LayerNorm",
    "Prologue",
    "RMSNorm",
    "explain",
    "lookup",
    "matmul",
]
