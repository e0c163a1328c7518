"""Factors between the inputs of a layer and its weights: x @ w = (x / s) @ (s * w).

Inputs may share a factor: those of heads that attend to the same values do. `owners` says which; without it each input
has its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.quantize import Precision, fake_quant

_SMALLEST = 1e-5  # of the magnitudes that factors are made of, as both papers' programs have it


def smoothquant_factors(
    largest: Float[Array, " k"], w: Float[Array, "k n"], alpha: float, owners: Int[Array, " k"], count: int
) -> Float[Array, " factors"]:
    """max|x|^alpha / max|w|^(1 - alpha): SmoothQuant, equation 4.

    Args:
      largest: magnitude of each input.
      w: weights of all layers with this input.
      alpha: how much moves into weights.
      owners: index of each input's factor.
      count: of factors.
    """
    x = jax.ops.segment_max(largest.astype(jnp.float32), owners, count)
    rows = jax.ops.segment_max(jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1), owners, count)
    return _usable(jnp.maximum(x, _SMALLEST) ** alpha / jnp.maximum(rows, _SMALLEST) ** (1 - alpha))


def awq_factors(
    mean: Float[Array, " k"],
    w: Float[Array, "k n"],
    hessian: Float[Array, "k k"],
    precision: Precision,
    steps: int,
    owners: Int[Array, " k"],
    count: int,
) -> Float[Array, " factors"]:
    """mean|x|^alpha with the alpha of least error of the outputs: AWQ, equations 4 and 5.

    The error of (x / s) @ round(s * w) is summed over tokens with the help of their second moments H: of each column d
    of round(s * w) / s - w it is d^T H d. Factors are divided by the geometric mean of the largest and the smallest.

    Args:
      mean: magnitude of each input, averaged over tokens.
      w: weights of all layers with this input.
      hessian: second moments of the inputs.
      precision: weights are rounded to the nearest of its grid.
      steps: alphas 0, 1 / steps ... 1 - 1 / steps are tried.
      owners, count: as of `smoothquant_factors`.
    """
    sums = jax.ops.segment_sum(mean.astype(jnp.float32), owners, count)
    members = jax.ops.segment_sum(jnp.ones_like(mean, jnp.float32), owners, count)
    magnitude, w = jnp.maximum(sums / members, _SMALLEST), w.astype(jnp.float32)

    def factors(alpha: Float[Array, ""]) -> Float[Array, " factors"]:
        powers = magnitude**alpha
        return _usable(powers / jnp.sqrt(jnp.max(powers) * jnp.min(powers)))

    def error(alpha: Float[Array, ""]) -> Float[Array, ""]:
        s = factors(alpha)[owners][:, None]
        rounded = fake_quant(
            s * w, precision.w_bits, -2, precision.group_size, precision.calibration, scales=precision.scales
        )
        difference = rounded / s - w
        return jnp.sum(difference * jnp.matmul(hessian, difference, precision=jax.lax.Precision.HIGHEST))

    alphas = jnp.arange(steps, dtype=jnp.float32) / steps
    return factors(alphas[jnp.argmin(jax.lax.map(error, alphas))])


def _usable(factors: Float[Array, " factors"]) -> Float[Array, " factors"]:
    """1 where a factor is not a positive finite number."""
    return jnp.where(jnp.isfinite(factors) & (factors > 0), factors, 1)
