"""Learned step size quantization (LSQ): scales that are trained with the weights, as floats or as integer groups.

Source: Esser et al. 2020, arXiv 1902.08153. In terms of this package the paper's step size s is
2 * scale, its levels round(w / s) are values / 2 (halves of odd integers; integers for ternary),
and its Q_N = Q_P is max_value / 2. Offsets are learned as in LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.calibration import Calibration, flush_scale, half_steps_per_unit
from bipolar_jax.quantize.groups import along_last, group_lengths, split_groups, spread_groups
from bipolar_jax.quantize.integer_groups import LARGEST_VALUE, SMALLEST_VALUE, IntegerGroups, largest_scale
from bipolar_jax.quantize.integer_scale_search import encode_integer_groups, round_to_integer_groups
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedGroups:
    """Floats that training moves, which become `IntegerGroups` where they are rounded.

    Attributes:
      row_scale: S, float32; not positive in rows that decode to zeros.
      scale: s before it is rounded and limited to 1 ... `largest_scale`.
      offset: o before it is rounded and limited to what the rounded s leaves of int8.
    """

    row_scale: Float[Array, "*rows 1"]
    scale: Float[Array, "*rows groups"]
    offset: Float[Array, "*rows groups"]

    @classmethod
    def initial(
        cls, rows: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int, calibration: Calibration
    ) -> LearnedGroups:
        """The groups that `quantize` finds; rows of zeros get a grid around zero with half the largest scale."""
        _, row_scale, groups = round_to_integer_groups(rows, number_format, group_size, calibration)
        scale, offset = (a.astype(jnp.float32) for a in (groups.scale, groups.offset))
        middle = (largest_scale(number_format) + 1) // 2
        below = -(middle * number_format.max_value // 2)
        no_grid = row_scale == 0
        return cls(row_scale, jnp.where(no_grid, middle, scale), jnp.where(no_grid, below, offset))

    @classmethod
    def of_step_size(cls, step_size: Float[Array, "*rows numbers"], number_format: BipolarFormat) -> LearnedGroups:
        """The groups of one array, see `step_size`."""
        step_size = step_size.astype(jnp.float32)
        row_scale, rest = step_size[..., :1], step_size[..., 1:]
        scale, offset = jnp.split(rest, 2, axis=-1)
        unit = _scale_unit(number_format)
        return cls(row_scale / unit, scale * unit, offset * -SMALLEST_VALUE)

    def step_size(self, number_format: BipolarFormat) -> Float[Array, "*rows numbers"]:
        """One array for training: S * U, s / U of all groups, o / 128 of all groups, with U = 2^(8 - bits).

        So S counts as the largest step size of the row, and the others are numbers up to about 1: one learning rate
        suits them, as it suits step sizes of float groups. The units are powers of two, so that no number is rounded.
        """
        unit = _scale_unit(number_format)
        return jnp.concatenate([self.row_scale * unit, self.scale / unit, self.offset / -SMALLEST_VALUE], axis=-1)

    def rounded(self, number_format: BipolarFormat) -> tuple[Float[Array, "*rows 1"], IntegerGroups]:
        """Row scales, 0 where they are not positive and NaN in rows with NaN or Inf, and the integer groups."""
        row_scale = flush_scale(self.row_scale)
        s = jnp.clip(jnp.round(self.scale), 1, largest_scale(number_format))
        o = jnp.clip(jnp.round(self.offset), SMALLEST_VALUE, LARGEST_VALUE - number_format.max_value * s)
        no_grid = row_scale == 0  # all numbers get the code `code_offset`, whose value has to be 0
        s, o = jnp.where(no_grid, 1, s), jnp.where(no_grid, -number_format.code_offset, o)
        finite = jnp.all(jnp.isfinite(self.scale) & jnp.isfinite(self.offset), axis=-1, keepdims=True)
        return jnp.where(finite, row_scale, jnp.nan), IntegerGroups(s.astype(jnp.uint8), o.astype(jnp.int8))


def _scale_unit(number_format: BipolarFormat) -> int:
    return 1 << (8 - number_format.bits)


def step_size_length(groups: int, *, integer: bool) -> int:
    """Numbers of a row's step sizes: one a group; with integer groups those of `LearnedGroups.step_size`."""
    return 1 + 2 * groups if integer else groups


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fake_quant_by_groups(
    rows: Float[Array, "*rows k"], learned: LearnedGroups, number_format: BipolarFormat, group_size: int
) -> Float[Array, "*rows k"]:
    """Rounds to S * (s * u + o) with the rounded groups, bit for bit the numbers that packed weights have.

    S, s and o are rounded straight-through. With v = (w / S - o) / s, u = round(v) limited to the codes 0 ... W, the
    derivatives of the result are

    - with respect to w: 1 where 0 < v < W, else 0;
    - with respect to S: s u + o - w / S where 0 < v < W, else s u + o;
    - with respect to s: S (u - v) there, else S u; with respect to o: 0 there, else S.

    Sums over a row (S) or a group (s, o) of N numbers are multiplied by 1 / sqrt(N W / 2), as for step sizes. An s or o
    beyond its limits has only gradients that lead back. A row whose S is not positive decodes to zeros; there w has
    the derivative 1, and S that of numbers beyond the range.

    Args:
      rows: any float dtype, contracted axis last.
      learned: see `LearnedGroups`.
      number_format: the grid, of 1 to 6 bits.
      group_size: numbers that share s and o.

    Returns:
      float32.
    """
    return _forward_groups(rows, learned, number_format, group_size)[0]


def _forward_groups(rows, learned, number_format, group_size):
    row_scale, groups = learned.rounded(number_format)
    codes = encode_integer_groups(rows, number_format, row_scale, groups, group_size)
    return row_scale * groups.values(codes, group_size).astype(jnp.float32), (rows, learned, codes)


def _backward_groups(number_format, group_size, residuals, cotangent):
    rows, learned, codes = residuals
    row_scale, groups = learned.rounded(number_format)
    k, largest = rows.shape[-1], number_format.max_value
    s, o = groups.scale.astype(jnp.float32), groups.offset.astype(jnp.float32)
    limits = (1, largest_scale(number_format)), (SMALLEST_VALUE, LARGEST_VALUE - largest * s)
    s, o = (spread_groups(a, k, group_size) for a in (s, o))
    u, w = codes.astype(jnp.float32), rows.astype(jnp.float32)
    has_grid = row_scale > 0
    in_steps = w / jnp.where(has_grid, row_scale, 1)
    v = (in_steps - o) / s
    within = (v > 0) & (v < largest)
    value = s * u + o
    # A row without a scale decodes to zeros. Its weights train on (straight-through), and S as if every number were
    # beyond the grid that the learned s and o make. Otherwise zero would be absorbing.
    bottom = spread_groups(jnp.clip(learned.offset, SMALLEST_VALUE, LARGEST_VALUE), k, group_size)
    reach = spread_groups(jnp.clip(learned.scale, *limits[0]), k, group_size) * largest
    beyond = jnp.where(w > 0, jnp.maximum(bottom + reach, 1), jnp.where(w < 0, jnp.minimum(bottom, -1), 0))
    by_row_scale = jnp.where(has_grid, jnp.where(within, value - in_steps, value), beyond)
    by_scale = row_scale * jnp.where(within, u - v, u)
    by_offset = row_scale * jnp.where(within, 0, 1)

    def of_groups(derivative: Float[Array, "*rows k"], size: int | None) -> Float[Array, "*rows groups"]:
        balance = 1 / np.sqrt(_float_lengths(k, size) * np.float32(largest / 2))
        sums = jnp.sum(split_groups(cotangent * derivative, size), axis=-1)
        return sums * along_last(balance, sums.ndim)

    by_learned = LearnedGroups(
        of_groups(by_row_scale, None),
        _leading_back(of_groups(by_scale, group_size), learned.scale, *limits[0]),
        _leading_back(of_groups(by_offset, group_size), learned.offset, *limits[1]),
    )
    return jnp.where(within | ~has_grid, cotangent, 0).astype(rows.dtype), by_learned


def _leading_back(gradient, number, low, high):
    """The gradient, but 0 where a step down it would take the number further beyond its limits."""
    return jnp.where(((number < low) & (gradient > 0)) | ((number > high) & (gradient < 0)), 0, gradient)


fake_quant_by_groups.defvjp(_forward_groups, _backward_groups)


def _float_lengths(k: int, group_size: int | None) -> np.ndarray:
    """Number of elements of every group, float32 [groups]."""
    return group_lengths(k, group_size).astype(np.float32)
