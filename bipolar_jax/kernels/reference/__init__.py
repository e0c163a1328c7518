"""The definition of every product, in pure jnp over bit planes; to compare with, never chosen by "auto"."""

from bipolar_jax.kernels.reference.matmul import integer_matmul, plan_matmul, quantized_matmul, weight_only_matmul
from bipolar_jax.kernels.semantics.weights import pack_weights
from bipolar_jax.kernels.unfused import (
    decode_attention,
    decode_layers,
    feed_forward,
    plan_decode_attention,
    plan_decode_layers,
    plan_feed_forward,
    plan_prompt_heads,
    prompt_heads,
)

__all__ = [
    "decode_attention",
    "decode_layers",
    "feed_forward",
    "integer_matmul",
    "pack_weights",
    "plan_decode_attention",
    "plan_decode_layers",
    "plan_feed_forward",
    "plan_matmul",
    "plan_prompt_heads",
    "prompt_heads",
    "quantized_matmul",
    "weight_only_matmul",
]
