"""Validated, differentiable operations over whatever backend serves them."""

from bipolar_jax.ops.lookup import lookup
from bipolar_jax.ops.matmul import matmul

__all__ = ["lookup", "matmul"]
