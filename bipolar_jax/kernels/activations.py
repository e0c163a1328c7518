"""Per-token quantization of activations: the numbers every backend's quantizer must give."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.calibration import absmax_scale, half_steps_per_unit


def quantize_tokens(
    x: Float[Array, "m k"], a_format: BipolarFormat
) -> tuple[UInt8[Array, "m k"], Float[Array, " m"]]:
    """Codes and float32 scale of every row; the row's largest magnitude takes the largest value."""
    x = x.astype(jnp.float32)
    scale = absmax_scale(x, a_format)
    return a_format.encode(x, half_steps_per_unit(scale)[:, None]), scale
