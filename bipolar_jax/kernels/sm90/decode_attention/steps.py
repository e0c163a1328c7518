"""The steps of a warpgroup in decode attention: the new token's vectors, scores, and the online softmax.

A vector is a pair of halves [half], spread over 8 threads and repeated in every group of 8. Rows of vectors are pairs
of fragments [ROWS, half]; scores and other numbers of a row are [ROWS].
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.grid import spanning_scale, zero_code_of
from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, AttentionPlan

Halves = tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]


class CachedVector(NamedTuple):
    """A vector as the cache holds it.

    Attributes:
      halves: numbers; or, of a quantized cache, codes as floats.
      scale: of the codes.
      zero: the code of zero, as a float.
    """

    halves: Halves
    scale: Float[Array, ""] | None = None
    zero: Float[Array, ""] | None = None

    def numbers(self) -> tuple[Array, ...]:
        """The numbers that attention reads from the cache."""
        if self.scale is None:
            return self.halves
        return tuple(2 * self.scale * (codes - self.zero) for codes in self.halves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """The online softmax of one query, separately in every row.

    Attributes:
      largest: largest score so far; scores are exponents of 2.
      weight: sum of 2^(score - largest).
      zeros: weighted sum of steps times zero codes, which is subtracted from all columns in the end; None for floats.
      halves: weighted sum of values, or of steps times codes.
    """

    largest: Float[Array, " rows"]
    weight: Float[Array, " rows"]
    zeros: Float[Array, " rows"] | None
    halves: Halves


def to_columns(plan: AttentionPlan, rows: Float[Array, " rows"]) -> Float[Array, "rows half"]:
    """A number of each row, in all of the row's columns."""
    return plgpu.layout_cast(lax.broadcast_in_dim(rows, (ROWS, plan.half), (0,)), plan.layout)


def to_rows(plan: AttentionPlan, half: Float[Array, " half"]) -> Float[Array, "rows half"]:
    """Half a vector, in all rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(half, (ROWS, plan.half), (1,)), plan.layout)


# The new token.


def load_vector(plan: AttentionPlan, ref, tables=None) -> Halves:
    """A vector of the new token, rotated if there are tables; as float32 numbers rounded to its dtype.

    Args:
      plan: of the kernel.
      ref: [head_dim] in global memory.
      tables: cosines and sines of the position, [half] each.
    """
    layout = plan.layout.reduce(0)

    def load(ref, start=0):
        return plgpu.load(ref.at[start : start + plan.half], layout=layout, optimized=False).astype(jnp.float32)

    first, second = load(ref), load(ref, plan.half)
    if tables is not None:
        cos, sin = map(load, tables)
        first, second = first * cos - second * sin, second * cos + first * sin
        first, second = (half.astype(ref.dtype).astype(jnp.float32) for half in (first, second))
    return first, second


def as_cached(plan: AttentionPlan, halves: Halves) -> CachedVector:
    """A vector as the cache will hold it."""
    return CachedVector(halves) if plan.bits is None else quantize_vector(halves, plan.bits)


def quantize_vector(halves: Halves, bits: int) -> CachedVector:
    """A vector on the grid that spans its numbers."""
    high = jnp.maximum(*(jnp.max(half, axis=0) for half in halves))
    low = jnp.minimum(*(jnp.min(half, axis=0) for half in halves))
    return quantize_between(halves, low, high, bits)


def quantize_between(
    parts: tuple[Array, ...], low: Float[Array, ""], high: Float[Array, ""], bits: int
) -> CachedVector:
    """A vector, given in parts, whose extremes are known; the numbers of `kernels.semantics.activations`."""
    number_format = BipolarFormat(bits)
    high, low = jnp.maximum(high, 0.0), jnp.minimum(low, 0.0)
    scale, half_steps = spanning_scale(high, low, number_format)
    zero = zero_code_of(low, half_steps, number_format).astype(jnp.float32)
    codes = tuple(_clip(_floor(part * half_steps + 0.5) + zero, number_format.max_value) for part in parts)
    return CachedVector(codes, scale, zero)


def _floor(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds numbers down that fit an int32; Mosaic has no floor."""
    towards_zero = x.astype(jnp.int32).astype(jnp.float32)
    return jnp.where(towards_zero > x, towards_zero - 1.0, towards_zero)


def _clip(x: Float[Array, "..."], top: int) -> Float[Array, "..."]:
    return jnp.minimum(jnp.maximum(x, 0.0), float(top))


def store_vector(plan: AttentionPlan, cached: CachedVector, refs, at: tuple) -> None:
    """Stores a vector in the cache.

    Args:
      plan: of the kernel.
      cached: the vector.
      refs: the cache's numbers; or its codes, scales and zero codes, in global memory.
      at: layer, sequence, head and position.
    """
    numbers, *grids = refs
    if plan.bits is None:
        for i, half in enumerate(cached.halves):
            numbers[*at, i * plan.half : (i + 1) * plan.half] = half.astype(numbers.dtype)
        return
    codes = [half.astype(jnp.int32) for half in cached.halves]
    if plan.bits == 4:
        codes = [codes[0] | (codes[1] << 4)]
    for i, half in enumerate(codes):
        numbers[*at, i * plan.half : (i + 1) * plan.half] = half.astype(jnp.uint8)
    scale, zero = grids
    scale[at] = cached.scale
    zero[at] = cached.zero.astype(jnp.int32).astype(jnp.uint8)


# Rows of the cache.


def load_rows(plan: AttentionPlan, ring, first: int) -> Halves:
    """Rows of numbers or of codes, as float32.

    Args:
      plan: of the kernel.
      ring: a slot of the ring buffer, [positions, elements].
      first: index of the first row.
    """

    def load(start):
        # [16, half]
        rows = ring.at[first : first + ROWS, start : start + plan.half]
        return plgpu.load(rows, layout=plan.layout, optimized=False)

    if plan.bits == 4:
        both = load(0).astype(jnp.int32)
        return (both & 15).astype(jnp.float32), (both >> 4).astype(jnp.float32)
    return load(0).astype(jnp.float32), load(plan.half).astype(jnp.float32)


def load_grids(plan: AttentionPlan, scale, zero, first) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Steps (twice the scale) and zero codes of rows.

    Args:
      plan: of the kernel.
      scale, zero: of one head, [capacity] each.
      first: position of the first row.
    """
    step, zero = (
        plgpu.load(ref.at[pl.ds(first, ROWS)], layout=plan.layout.reduce(1), optimized=False) for ref in (scale, zero)
    )
    return 2.0 * step, zero.astype(jnp.float32)


def products(queries: Halves, keys: Halves) -> Float[Array, " rows"]:
    """Dot products of a query, in all rows, with each row's key."""
    return jnp.sum(queries[0] * keys[0] + queries[1] * keys[1], axis=1)


def start_sums(plan: AttentionPlan, score, values: Halves, share) -> Sums:
    """Sums that contain the new token, with the weight `share` in each row: 1 / ROWS, or 0 in all but one block."""
    rows = plan.layout.reduce(1)

    def fill(number):
        return plgpu.layout_cast(lax.broadcast_in_dim(number, (ROWS,), ()), rows)

    halves = tuple(to_rows(plan, half * share) for half in values)
    zeros = None if plan.bits is None else fill(jnp.float32(0))
    return Sums(fill(score), fill(share), zeros, halves)


def rescale(plan: AttentionPlan, sums: Sums, scores: list) -> tuple[Sums, list]:
    """Rescales the sums to include further scores; returns them without the new values, and the new weights."""
    largest = sums.largest
    for score in scores:
        largest = jnp.maximum(largest, score)
    shrink = jnp.exp2(sums.largest - largest)
    weights = [jnp.exp2(score - largest) for score in scores]
    weight = sums.weight * shrink
    for each in weights:
        weight = weight + each
    factor = to_columns(plan, shrink)
    zeros = None if sums.zeros is None else sums.zeros * shrink
    return Sums(largest, weight, zeros, tuple(half * factor for half in sums.halves)), weights


def add_values(plan: AttentionPlan, sums: Sums, weights, values: Halves, grid=None) -> Sums:
    """Adds weighted rows of values, or of codes with their (step, zero) `grid`."""
    zeros = sums.zeros
    if grid is not None:
        step, zero = grid
        weights = weights * step
        zeros = zeros + weights * zero
    factor = to_columns(plan, weights)
    halves = tuple(total + factor * half for total, half in zip(sums.halves, values, strict=True))
    return Sums(sums.largest, sums.weight, zeros, halves)
