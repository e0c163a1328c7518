"""The token's numbers to bit planes: every block quantizes all, every warpgroup the parts of K that it multiplies.

The arithmetic is that of `kernels.activations.quantize_tokens`, where the reasons are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.bit_planes import pack
from bipolar_jax.kernels.sm90.decode_step.config import WARPGROUPS
from bipolar_jax.kernels.sm90.decode_step.exchange import collect, share
from bipolar_jax.kernels.sm90.decode_step.vectors import clear_beyond
from bipolar_jax.quantize.calibration import LARGEST_SCALE, SMALLEST_SCALE


class Grid(NamedTuple):
    """The token's grid, scalars: numbers are 2 scale (code - zero_code), or scale (2 code - 1) of one bit."""

    scale: Float[Array, ""]
    zero_code: Int[Array, ""]


def layer_normalized(
    parts: Sequence[Float[Array, "1024"]],
    gains: Sequence[Float[Array, "1024"]],
    biases: Sequence[Float[Array, "1024"]],
    k: int,
    eps: float,
    me: Int[Array, ""],
    shared,
) -> list[Float[Array, "1024"]]:
    """This warpgroup's parts of (x - mean(x)) / sqrt(var(x) + eps) * gain + bias, 0 beyond K.

    The variance is of the differences: mean of squares less square of mean cancels where the mean is large.
    """
    emulate = shared.emulate
    share(shared.exchange.at[3], me, parts, "sum", emulate=emulate)
    shared.meet()
    mean = collect(shared.exchange.at[3], "sum", emulate=emulate) * (1 / k)

    def cleared(turn, part):
        return clear_beyond(part, (me + turn * WARPGROUPS) * K_SLICE, k, emulate=emulate)

    differences = [cleared(turn, part - mean) for turn, part in enumerate(parts)]
    share(shared.exchange.at[2], me, [part * part for part in differences], "sum", emulate=emulate)
    shared.meet()
    size = lax.rsqrt(collect(shared.exchange.at[2], "sum", emulate=emulate) * (1 / k) + eps)
    return [
        cleared(turn, part * size * gain + bias)
        for turn, (part, gain, bias) in enumerate(zip(differences, gains, biases, strict=True))
    ]


def quantize_token(
    parts: Sequence[Float[Array, "1024"]],
    squares: Sequence[Float[Array, "1024"]] | None,
    k: int,
    eps: float,
    a_format: BipolarFormat,
    me: Int[Array, ""],
    shared,
) -> Grid:
    """Packs this warpgroup's parts of the token into its tiles, and leaves the sums of codes.

    Args:
      parts: this warpgroup's, 0 beyond K.
      squares: with an RMSNorm: x^2, the parts being x * gain; what is quantized is these times
        r = 1 / sqrt(mean(x^2) + eps).
      k: elements that count.
      eps: of the norm.
      a_format: 1 to 8 bits.
      me: the warpgroup.
      shared: `exchange` float32 [8, warps], `code_sums` int32 [warps], `x_tiles` [warpgroups, parts, 8, 32], `meet`.
    """
    emulate = shared.emulate
    share(shared.exchange.at[0], me, parts, "max", emulate=emulate)
    share(shared.exchange.at[1], me, parts, "min", emulate=emulate)
    if squares is not None:
        share(shared.exchange.at[2], me, squares, "sum", emulate=emulate)
    shared.meet()
    high = jnp.maximum(collect(shared.exchange.at[0], "max", emulate=emulate), 0.0)
    low = jnp.minimum(collect(shared.exchange.at[1], "min", emulate=emulate), 0.0)
    size = None
    if squares is not None:
        size = lax.rsqrt(collect(shared.exchange.at[2], "sum", emulate=emulate) * (1 / k) + eps)
    grid, half_steps = _grid(high, low, size, a_format)
    middle = jnp.float32(a_format.code_offset) if a_format.bits == 1 else grid.zero_code.astype(jnp.float32)
    tiles = [shared.x_tiles.at[me, turn] for turn in range(len(parts))]
    starts = [(me + turn * WARPGROUPS) * K_SLICE for turn in range(len(parts))]
    pack(tiles, shared.code_sums, me, parts, starts, k, half_steps, middle, a_format, emulate=emulate)
    plgpu.commit_smem()
    return grid


def _grid(high, low, size, a_format: BipolarFormat) -> tuple[Grid, Float[Array, ""]]:
    """`spanning_grid` of numbers from low to high, times the size if there is one; and 1 / (2 scale)."""
    top = a_format.max_value
    scale = jnp.maximum(high, -low) if top == 1 else (high * 0.5 - low * 0.5) * (1 / top)
    if size is not None:
        scale = scale * size
    scale = jnp.where(scale > LARGEST_SCALE, jnp.float32(float("inf")), scale)
    vanishes = scale < SMALLEST_SCALE
    scale = jnp.where(vanishes, 0.0, scale)
    half_steps = jnp.where(vanishes, 0.0, 0.5 / jnp.where(vanishes, 1.0, scale))
    if size is not None:
        half_steps = half_steps * size
    if top == 1:
        return Grid(scale, jnp.int32(0)), half_steps
    zero_code = jnp.minimum(jnp.maximum(0.5 - low * half_steps, 0.0), float(top)).astype(jnp.int32)
    return Grid(scale, zero_code), half_steps
