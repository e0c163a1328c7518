"""Learned step size quantization (LSQ): scales that are trained with the weights.

Source: Esser et al. 2020, arXiv 1902.08153. In terms of this package the paper's step size s is
2 * scale, its levels round(w / s) are values / 2 (halves of odd integers; integers for ternary),
and its Q_N = Q_P is max_value / 2.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.calibration import flush_scale, half_steps_per_unit
from bipolar_jax.quantize.groups import along_last, group_lengths, split_groups, spread_groups
from bipolar_jax.quantize.rounding import encode_rows


def initial_step_size(
    rows: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int | None
) -> Float[Array, "*rows groups"]:
    """The step size to begin with, 2 mean(|w|) / sqrt(Q_P) for each group, float32 (section 2.1 of the paper)."""
    magnitudes = jnp.sum(split_groups(jnp.abs(rows.astype(jnp.float32)), group_size), axis=-1)
    mean = magnitudes / along_last(_float_lengths(rows.shape[-1], group_size), magnitudes.ndim)
    return 2 * mean / math.sqrt(number_format.max_value / 2)


def round_by_step_size(
    rows: Float[Array, "*rows k"],
    step_size: Float[Array, "*rows groups"],
    number_format: BipolarFormat,
    group_size: int | None,
) -> tuple[UInt8[Array, "*rows k"], Float[Array, "*rows groups"]]:
    """Encodes rows with given step sizes.

    Returns:
      uint8 codes, and float32 scales as `scale_of_step` gives.
    """
    scale = scale_of_step(step_size)
    return encode_rows(rows, number_format, half_steps_per_unit(scale), None, group_size), scale


def scale_of_step(step_size: Float[Array, "..."]) -> Float[Array, "..."]:
    """scale = step_size / 2, float32; 0 for steps that are not positive."""
    return flush_scale(step_size.astype(jnp.float32) / 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fake_quant_by_step_size(
    rows: Float[Array, "*rows k"],
    step_size: Float[Array, "*rows groups"],
    number_format: BipolarFormat,
    group_size: int | None,
) -> Float[Array, "*rows k"]:
    """Rounds to the grid of the given step sizes and back, with the paper's gradients.

    With u = w / s and Q = max_value / 2, the derivatives of the result are

    - with respect to w: 1 where |u| < Q, else 0 (equation 5);
    - with respect to s: round(u) - u where |u| < Q, else -Q or Q (equation 3); the sum over a
      group is multiplied by 1 / sqrt(N Q), N being the size of the group (section 2.2).

    A step that is 0 (weights that begin as zeros) or negative decodes to zeros. There the derivative with respect to
    w is 1, and with respect to s -Q or Q by w's sign, so that weights leave zero first and their step follows.

    Args:
      rows: any float dtype, contracted axis last.
      step_size: one for each group of each row; see `initial_step_size`.
      number_format: the grid.
      group_size: numbers that share a step size; None for all of a row.

    Returns:
      float32.
    """
    return _forward(rows, step_size, number_format, group_size)[0]


def _forward(rows, step_size, number_format, group_size):
    codes, scale = round_by_step_size(rows, step_size, number_format, group_size)
    levels = number_format.values(codes).astype(jnp.float32) / 2
    rounded = levels * spread_groups(2 * scale, rows.shape[-1], group_size)
    return rounded, (rows, step_size, levels)


def _backward(number_format, group_size, residuals, cotangent):
    rows, step_size, levels = residuals
    k, largest = rows.shape[-1], number_format.max_value / 2
    u = rows.astype(jnp.float32) * spread_groups(2 * half_steps_per_unit(step_size), k, group_size)
    # A grid without a step decodes to zeros. Its weights train on (straight-through), and the step with them: by the
    # limit of equation 3, as if every number were beyond the range. Otherwise zero would be absorbing.
    has_step = spread_groups(scale_of_step(step_size) > 0, k, group_size)
    within = jnp.abs(u) < largest
    by_step = jnp.where(within & has_step, levels - u, largest * jnp.sign(rows.astype(jnp.float32)))
    balance = 1 / np.sqrt(_float_lengths(k, group_size) * np.float32(largest))
    gradient = jnp.sum(split_groups(cotangent * by_step, group_size), axis=-1)
    gradient = gradient * along_last(balance, gradient.ndim)
    return jnp.where(within | ~has_step, cotangent, 0).astype(rows.dtype), gradient.astype(step_size.dtype)


fake_quant_by_step_size.defvjp(_forward, _backward)


def _float_lengths(k: int, group_size: int | None) -> np.ndarray:
    """Number of elements of every group, float32 [groups]."""
    return group_lengths(k, group_size).astype(np.float32)
