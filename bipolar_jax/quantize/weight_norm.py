"""Normalization of weights before they are quantized: to mean 0, or also to variance 1."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.quantize.fixed_point import fixed_point_mean

WeightNorm = Literal["center", "standardize"]

# Smallest variance that is divided by, so that a channel of equal weights stays finite.
_SMALLEST_VARIANCE = 1e-12


def check_weight_norm(weight_norm: str | None) -> None:
    """Raises ValueError unless `weight_norm` is None or a `WeightNorm`."""
    if weight_norm is not None and weight_norm not in get_args(WeightNorm):
        raise ValueError(f"weight_norm must be None, {' or '.join(get_args(WeightNorm))}, got {weight_norm!r}")


def normalize_weights(w: Float[Array, "*batch k n"], weight_norm: WeightNorm | None) -> Float[Array, "*batch k n"]:
    """Subtracts means from weights, so that about half of the signs, all that one bit keeps, are positive.

    Differentiable: gradients pass through the mean and the variance.

    Args:
      w: float32 kernels; k is the contracted axis.
      weight_norm: "center" subtracts the mean of the whole kernel (BitNet, arXiv
        2310.11453, equation 2; BiT, arXiv 2205.13016, section 2.2); "standardize" subtracts
        each output channel's mean and divides by its standard deviation (IR-Net, arXiv
        1909.10788, equation 8), which fixes the magnitude of the outputs, so that a
        normalization or a learned scale should follow the layer; None returns w unchanged.

    Returns:
      float32, in w's shape.

    Raises:
      ValueError: another `weight_norm`.
    """
    check_weight_norm(weight_norm)
    if weight_norm is None:
        return w
    if weight_norm == "center":
        return w - fixed_point_mean(_column_means(w))[..., None, None]
    centered = w - _column_means(w)[..., None, :]
    variance = _column_means(centered * centered)[..., None, :]
    return centered / jnp.sqrt(jnp.maximum(variance, _SMALLEST_VARIANCE))


def _column_means(w: Float[Array, "*batch k n"]) -> Float[Array, "*batch n"]:
    return fixed_point_mean(jnp.swapaxes(w, -1, -2))
