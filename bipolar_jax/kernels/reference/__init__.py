"""Pure jnp over bit planes: the definition."""

from bipolar_jax.kernels.reference.matmul import integer_matmul, plan_matmul, quantized_matmul, weight_only_matmul
from bipolar_jax.kernels.semantics.weights import pack_weights

__all__ = ["integer_matmul", "pack_weights", "plan_matmul", "quantized_matmul", "weight_only_matmul"]
