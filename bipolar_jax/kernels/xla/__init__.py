"""XLA's int8 dot: runs everywhere."""

from bipolar_jax.kernels.semantics.weights import pack_weights
from bipolar_jax.kernels.xla.matmul import integer_matmul, plan_matmul, quantized_matmul, weight_only_matmul

__all__ = ["integer_matmul", "pack_weights", "plan_matmul", "quantized_matmul", "weight_only_matmul"]
