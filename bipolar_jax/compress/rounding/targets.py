"""Targets of a rounding that makes up for what the quantized layers before it have changed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.compress.rounding.sweep import HIGHEST


def asymmetric_target(
    rows: Float[Array, "k n"], hessian: Float[Array, "k k"], difference: Float[Array, "k k"], asymmetry: float
) -> Float[Array, "k n"]:
    """The weights w' whose products with the quantized model's inputs come nearest to those of w with the float one's.

    With inputs x~ of the quantized model and x of the float one, sum (q x~ - w x)^2 over tokens is
    (q - w') H (q - w')^T and a constant, where H = sum x~ x~^T and w' = w + w (sum x x~^T - H) H^-1 (GPTAQ, arXiv
    2504.02692; Qronos, arXiv 2505.11695).

    Args:
      rows: w, inputs first.
      hessian: H, damped.
      difference: sum x~ x^T - H without damping, in the units of `hessian`.
      asymmetry: how much of w' - w is added, 0 to 1.

    Returns:
      w', inputs first.
    """
    factor = jax.scipy.linalg.cho_factor(hessian)
    return rows + asymmetry * jax.scipy.linalg.cho_solve(factor, jnp.matmul(difference, rows, precision=HIGHEST))
