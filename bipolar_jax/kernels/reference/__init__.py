"""Pure jnp over bit planes: the definition."""

from bipolar_jax.kernels.reference.matmul import integer_matmul, plan_matmul, quantized_matmul, weight_only_matmul

__all__ = ["integer_matmul", "plan_matmul", "quantized_matmul", "weight_only_matmul"]
