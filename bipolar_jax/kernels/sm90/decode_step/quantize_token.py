"""Normalizes and quantizes tokens: every block whole tokens, every warpgroup the K slices that it multiplies.

The arithmetic is that of `kernels.semantics.activations.quantize_tokens`, which gives the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.grid import spanning_scale, zero_code_of
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import RESULTS_OF_TEXT, WARPGROUPS
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import reduce_block, reduce_warps
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import zero_beyond
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_products import FloatKind
from bipolar_jax.kernels.sm90.decode_step.weight_ring import WeightKind

# Rows of `SharedMemory.warp_results` of each text.
_MAX, _MIN, _SQUARES, _SUM = range(RESULTS_OF_TEXT)


class TokenGrid(NamedTuple):
    """The token's grid: numbers are 2 scale (code - zero_code), or scale (2 code - 1) for one bit."""

    scale: Float[Array, ""]
    zero_code: Int[Array, ""]


def with_grids_of(own_text, grid: TokenGrid | None, texts: Sequence, grids: Sequence[TokenGrid]) -> TokenGrid | None:
    """The grid of a text where it is among these texts, else the grid so far."""
    for text, found in zip(texts, grids, strict=True):
        grid = TokenGrid(*(jnp.where(text == own_text, *pair) for pair in zip(found, grid, strict=True)))
    return grid


class TokenSlices(NamedTuple):
    """A warpgroup's K slices of a token.

    Attributes:
      text: whose token.
      k_slices: 0 beyond K.
      squares: for an RMSNorm: x^2, where the K slices are x * gain; these times 1 / sqrt(mean(x^2) + eps) are
        quantized.
    """

    text: Int[Array, ""] | int
    k_slices: Sequence[Float[Array, "1024"]]
    squares: Sequence[Float[Array, "1024"]] | None

    def results(self, shared, kind: int) -> Any:
        """The row of `warp_results` of one kind."""
        return shared.warp_results.at[RESULTS_OF_TEXT * self.text + kind]


def slice_starts(warpgroup: Int[Array, ""], count: int) -> list[Int[Array, ""]]:
    """Index in K of the first element of each of a warpgroup's K slices."""
    return [(warpgroup + i * WARPGROUPS) * K_SLICE for i in range(count)]


def layer_normalized(
    k_slices: Sequence[Float[Array, "1024"]],
    gains: Sequence[Float[Array, "1024"]],
    biases: Sequence[Float[Array, "1024"]],
    k: int,
    eps: float,
    warpgroup: Int[Array, ""],
    shared,
    text: Int[Array, ""] | int = 0,
) -> list[Float[Array, "1024"]]:
    """This warpgroup's K slices of (x - mean(x)) / sqrt(var(x) + eps) * gain + bias, 0 beyond K.

    The variance is the mean of squared differences: the mean of squares less the squared mean cancels where the mean is
    large.
    """
    starts = slice_starts(warpgroup, len(k_slices))
    token = TokenSlices(text, k_slices, None)
    results = token.results(shared, _SUM)
    reduce_warps(results, warpgroup, k_slices, "sum")
    shared.meet()
    mean = reduce_block(results, "sum") * (1 / k)
    differences = [zero_beyond(x - mean, start, k) for x, start in zip(k_slices, starts, strict=True)]
    results = token.results(shared, _SQUARES)
    reduce_warps(results, warpgroup, [x * x for x in differences], "sum")
    shared.meet()
    factor = lax.rsqrt(reduce_block(results, "sum") * (1 / k) + eps)
    return [
        zero_beyond(x * factor * gain + bias, start, k)
        for x, gain, bias, start in zip(differences, gains, biases, starts, strict=True)
    ]


def quantize_tokens(
    tokens: Sequence[TokenSlices],
    k: int,
    eps: float,
    a_format: BipolarFormat,
    kind: WeightKind,
    warpgroup: Int[Array, ""],
    shared,
) -> list[TokenGrid]:
    """Stores this warpgroup's K slices of tokens as its products take them, and its warps' sums of codes.

    Args:
      tokens: of different texts.
      k: the contracted size.
      eps: of the norm.
      a_format: 1 to 8 bits.
      kind: of the weights.
      warpgroup: of the calling threads.
      shared: `phases.SharedMemory`.
    """
    for token in tokens:
        reduce_warps(token.results(shared, _MAX), warpgroup, token.k_slices, "max")
        reduce_warps(token.results(shared, _MIN), warpgroup, token.k_slices, "min")
        if token.squares is not None:
            reduce_warps(token.results(shared, _SQUARES), warpgroup, token.squares, "sum")
    shared.meet()
    return [_quantize(token, k, eps, a_format, kind, warpgroup, shared) for token in tokens]


def _quantize(
    token: TokenSlices, k: int, eps: float, a_format: BipolarFormat, kind: WeightKind, warpgroup: Int[Array, ""], shared
) -> TokenGrid:
    """Stores a token, whose extremes are in shared memory."""
    high = jnp.maximum(reduce_block(token.results(shared, _MAX), "max"), 0.0)
    low = jnp.minimum(reduce_block(token.results(shared, _MIN), "min"), 0.0)
    factor = None
    if token.squares is not None:
        factor = lax.rsqrt(reduce_block(token.results(shared, _SQUARES), "sum") * (1 / k) + eps)
    scale, half_steps = spanning_scale(high, low, a_format, factor)
    one_bit = a_format.bits == 1
    zero_code = jnp.int32(0) if one_bit else zero_code_of(low, half_steps, a_format)
    middle = jnp.float32(a_format.code_offset) if one_bit else zero_code.astype(jnp.float32)
    code_sums, starts = shared.code_sums.at[token.text], slice_starts(warpgroup, len(token.k_slices))
    numbers = (token.k_slices, starts, k, half_steps, middle)
    kind.store_token(shared.x_operand, code_sums, warpgroup, *numbers, text=token.text)
    return TokenGrid(scale, zero_code)


def round_token(
    k_slices: Sequence[Float[Array, "1024"]],
    squares: Sequence[Float[Array, "1024"]] | None,
    k: int,
    eps: float,
    kind: FloatKind,
    warpgroup: Int[Array, ""],
    shared,
) -> None:
    """Stores this warpgroup's K slices of the token as 16-bit floats; arguments as `quantize_tokens` has them."""
    factor, results = None, shared.warp_results.at[_SQUARES]
    if squares is not None:
        reduce_warps(results, warpgroup, squares, "sum")
    # Also without squares: sums of the product before have been taken.
    shared.meet()
    if squares is not None:
        factor = lax.rsqrt(reduce_block(results, "sum") * (1 / k) + eps)
    starts = slice_starts(warpgroup, len(k_slices))
    kind.store_float_token(shared.x_operand, warpgroup, k_slices, starts, k, factor)
