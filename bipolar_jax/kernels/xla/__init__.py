"""Products by XLA's int8 dot, on any device."""

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
from bipolar_jax.kernels.xla.matmul import (
    integer_matmul,
    plan_matmul,
    quantized_matmul,
    tokens_matmul,
    weight_only_matmul,
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
    "tokens_matmul",
    "weight_only_matmul",
]
