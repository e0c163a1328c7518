"""Normalizes and quantizes tokens: every warpgroup some K slices of a token, each team of warpgroups the whole token.

The arithmetic is that of `kernels.semantics.activations.quantize_tokens`, which gives the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.grid import spanning_scale, zero_code_of
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import Kind, reduce_warpgroups, reduce_warps
from bipolar_jax.kernels.sm90.decode_step.cooperative.teams import Team
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import zero_beyond
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_products import FloatKind
from bipolar_jax.kernels.sm90.decode_step.weight_ring import WeightKind

# Rows of `SharedMemory.warp_results`.
_MAX, _MIN, _SQUARES, _SUM = range(4)


class TokenGrid(NamedTuple):
    """The token's grid: numbers are 2 scale (code - zero_code), or scale (2 code - 1) for one bit."""

    scale: Float[Array, ""]
    zero_code: Int[Array, ""]


class TokenSlices(NamedTuple):
    """A warpgroup's K slices of a token.

    Attributes:
      k_slices: 0 beyond K.
      squares: for an RMSNorm: x^2, where the K slices are x * gain; these times 1 / sqrt(mean(x^2) + eps) are
        quantized.
    """

    k_slices: Sequence[Float[Array, "1024"]]
    squares: Sequence[Float[Array, "1024"]] | None


def slice_starts(team: Team, count: int) -> list[Int[Array, ""]]:
    """Index in K of the first element of each of a warpgroup's K slices."""
    return [(team.part + i * team.count) * K_SLICE for i in range(count)]


def layer_normalized(
    k_slices: Sequence[Float[Array, "1024"]],
    gains: Sequence[Float[Array, "1024"]],
    biases: Sequence[Float[Array, "1024"]],
    k: int,
    eps: float,
    team: Team,
    warpgroup: Int[Array, ""],
    shared,
) -> list[Float[Array, "1024"]]:
    """This warpgroup's K slices of (x - mean(x)) / sqrt(var(x) + eps) * gain + bias, 0 beyond K.

    The variance is the mean of squared differences: the mean of squares less the squared mean cancels where the mean is
    large.
    """
    starts = slice_starts(team, len(k_slices))
    reduce_warps(shared.warp_results.at[_SUM], warpgroup, k_slices, "sum")
    shared.meet()
    mean = _of_team(team, shared, _SUM, "sum") * (1 / k)
    differences = [zero_beyond(x - mean, start, k) for x, start in zip(k_slices, starts, strict=True)]
    reduce_warps(shared.warp_results.at[_SQUARES], warpgroup, [x * x for x in differences], "sum")
    shared.meet()
    factor = lax.rsqrt(_of_team(team, shared, _SQUARES, "sum") * (1 / k) + eps)
    return [
        zero_beyond(x * factor * gain + bias, start, k)
        for x, gain, bias, start in zip(differences, gains, biases, starts, strict=True)
    ]


def quantize_token(
    token: TokenSlices,
    k: int,
    eps: float,
    a_format: BipolarFormat,
    kind: WeightKind,
    team: Team,
    warpgroup: Int[Array, ""],
    shared,
) -> TokenGrid:
    """Stores this warpgroup's K slices of a token as products take them, and its warps' sums of codes.

    Args:
      token: of the team's text.
      k: the contracted size.
      eps: of the norm.
      a_format: 1 to 8 bits.
      kind: of the weights.
      team: of the warpgroup.
      warpgroup: of the calling threads.
      shared: `phases.SharedMemory`.
    """
    results = shared.warp_results
    reduce_warps(results.at[_MAX], warpgroup, token.k_slices, "max")
    reduce_warps(results.at[_MIN], warpgroup, token.k_slices, "min")
    if token.squares is not None:
        reduce_warps(results.at[_SQUARES], warpgroup, token.squares, "sum")
    shared.meet()
    high = jnp.maximum(_of_team(team, shared, _MAX, "max"), 0.0)
    low = jnp.minimum(_of_team(team, shared, _MIN, "min"), 0.0)
    factor = None
    if token.squares is not None:
        factor = lax.rsqrt(_of_team(team, shared, _SQUARES, "sum") * (1 / k) + eps)
    scale, half_steps = spanning_scale(high, low, a_format, factor)
    one_bit = a_format.bits == 1
    zero_code = jnp.int32(0) if one_bit else zero_code_of(low, half_steps, a_format)
    middle = jnp.float32(a_format.code_offset) if one_bit else zero_code.astype(jnp.float32)
    numbers = (token.k_slices, slice_starts(team, len(token.k_slices)), k, half_steps, middle)

    def store() -> None:
        kind.store_token(shared.x_operand, shared.code_sums.at[team.text], warpgroup, *numbers, text=team.text)

    if team.exists is True:
        store()
    else:
        when(team.exists)(store)
    return TokenGrid(scale, zero_code)


def _of_team(team: Team, shared, row: int, kind: Kind) -> Float[Array, ""]:
    return reduce_warpgroups(shared.warp_results.at[row], team.first, team.count, kind)


def round_token(
    token: TokenSlices, k: int, eps: float, kind: FloatKind, team: Team, warpgroup: Int[Array, ""], shared
) -> None:
    """Stores this warpgroup's K slices of the token as 16-bit floats; arguments as `quantize_token` has them."""
    factor = None
    if token.squares is not None:
        reduce_warps(shared.warp_results.at[_SQUARES], warpgroup, token.squares, "sum")
    # Also without squares: sums of the product before have been taken.
    shared.meet()
    if token.squares is not None:
        factor = lax.rsqrt(_of_team(team, shared, _SQUARES, "sum") * (1 / k) + eps)
    starts = slice_starts(team, len(token.k_slices))
    kind.store_float_token(shared.x_operand, warpgroup, token.k_slices, starts, k, factor)
