"""What a warpgroup of decode attention does: a new token's vectors, scores, sums, and their way through the cluster.

Vectors are pairs of halves, [half] each, spread over 8 threads, and whole in every group of 8; rows of vectors are
pairs of [16, half]. What there is of a row, such as its score, is [16].
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
from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, AttentionPlan
from bipolar_jax.quantize.calibration import flush_scale, half_steps_per_unit

Halves = tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]


class Kept(NamedTuple):
    """A vector as the cache holds it: numbers, or codes (floats that are integers), half a step, and the code of 0."""

    halves: Halves
    scale: Float[Array, ""] | None = None
    zero: Float[Array, ""] | None = None

    def numbers(self) -> Halves:
        """What attention gets to see."""
        if self.scale is None:
            return self.halves
        return tuple(2 * self.scale * (codes - self.zero) for codes in self.halves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Softmax so far of one query, in every row by itself; numbers are sum / weight of all rows, scaled by 2^largest.

    Attributes:
      largest: score, in powers of two.
      weight: sum of 2^(score - largest).
      zeros: sum of the products with the codes of 0, to be taken from all columns; None for floats.
      halves: sum of the products with values, or with codes times two scales.
    """

    largest: Float[Array, " rows"]
    weight: Float[Array, " rows"]
    zeros: Float[Array, " rows"] | None
    halves: Halves


def to_columns(plan: AttentionPlan, rows: Float[Array, " rows"]) -> Float[Array, "rows half"]:
    """What there is of a row, in all of its columns."""
    return plgpu.layout_cast(lax.broadcast_in_dim(rows, (ROWS, plan.half), (0,)), plan.layout)


def to_rows(plan: AttentionPlan, half: Float[Array, " half"]) -> Float[Array, "rows half"]:
    """A vector's half in all rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(half, (ROWS, plan.half), (1,)), plan.layout)


# The new token.


def load_vector(plan: AttentionPlan, ref, tables=None) -> Halves:
    """A vector of the new token, in its dtype's precision; rotated as `models.rope.rotate` does if there are tables.

    Args:
      ref: [head_dim] in global memory.
      tables: cosines and sines, [half] each.
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


def keep(plan: AttentionPlan, halves: Halves) -> Kept:
    """A vector as the cache will hold it."""
    return Kept(halves) if plan.bits is None else quantize_vector(halves, plan.bits)


def quantize_vector(halves: Halves, bits: int) -> Kept:
    high = jnp.maximum(*(jnp.max(half, axis=0) for half in halves))
    low = jnp.minimum(*(jnp.min(half, axis=0) for half in halves))
    return quantize_between(halves, low, high, bits)


def quantize_between(parts: tuple[Array, ...], low: Float[Array, ""], high: Float[Array, ""], bits: int) -> Kept:
    """A vector, in parts, whose extremes are known.

    The numbers are those of `kernels.activations.quantize_tokens`, as XLA compiles it: a constant divisor is a factor.
    """
    top = BipolarFormat(bits).max_value
    high, low = jnp.maximum(high, 0.0), jnp.minimum(low, 0.0)
    scale = flush_scale((high * 0.5 - low * 0.5) * (1 / top))
    half_steps = half_steps_per_unit(scale)
    zero = _clip(_floor(0.5 - low * half_steps), top)
    return Kept(tuple(_clip(_floor(part * half_steps + 0.5) + zero, top) for part in parts), scale, zero)


def _floor(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of numbers that an int32 holds; Mosaic has no floor."""
    towards_zero = x.astype(jnp.int32).astype(jnp.float32)
    return jnp.where(towards_zero > x, towards_zero - 1.0, towards_zero)


def _clip(x: Float[Array, "..."], top: int) -> Float[Array, "..."]:
    return jnp.minimum(jnp.maximum(x, 0.0), float(top))


def store_vector(plan: AttentionPlan, kept: Kept, refs, at: tuple) -> None:
    """Writes a vector where the cache has it.

    Args:
      kept: the vector.
      refs: numbers, or codes, scale and zero, in global memory.
      at: layer, sequence, head and position.
    """
    numbers, *of_vector = refs
    if plan.bits is None:
        for part, half in enumerate(kept.halves):
            numbers[*at, part * plan.half : (part + 1) * plan.half] = half.astype(numbers.dtype)
        return
    codes = [half.astype(jnp.int32) for half in kept.halves]
    if plan.bits == 4:
        codes = [codes[0] | (codes[1] << 4)]
    for part, half in enumerate(codes):
        numbers[*at, part * plan.half : (part + 1) * plan.half] = half.astype(jnp.uint8)
    scale, zero = of_vector
    scale[at] = kept.scale
    zero[at] = kept.zero.astype(jnp.int32).astype(jnp.uint8)


# Rows of the cache.


def load_rows(plan: AttentionPlan, ring, first: int) -> Halves:
    """Rows of numbers, or of codes, in float32.

    Args:
      ring: a slot of it, [positions, numbers or bytes].
      first: row.
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
    """Steps (twice the scale) and codes of 0 of rows.

    Args:
      scale, zero: of one head, [capacity] each.
      first: position of the first row.
    """
    step, zero = (
        plgpu.load(ref.at[pl.ds(first, ROWS)], layout=plan.layout.reduce(1), optimized=False) for ref in (scale, zero)
    )
    return 2.0 * step, zero.astype(jnp.float32)


def products(queries: Halves, keys: Halves) -> Float[Array, " rows"]:
    """Products of a query, in all rows, with every row's key."""
    return jnp.sum(queries[0] * keys[0] + queries[1] * keys[1], axis=1)


def start_sums(plan: AttentionPlan, score, values: Halves, share) -> Sums:
    """Sums that have seen the new token: every row its part, which is 1 / 16 or nothing."""
    rows = plan.layout.reduce(1)

    def fill(number):
        return plgpu.layout_cast(lax.broadcast_in_dim(number, (ROWS,), ()), rows)

    halves = tuple(to_rows(plan, half * share) for half in values)
    zeros = None if plan.bits is None else fill(jnp.float32(0))
    return Sums(fill(score), fill(share), zeros, halves)


def rescale(plan: AttentionPlan, sums: Sums, scores: list) -> tuple[Sums, list]:
    """Makes room for scores of further rows; returns the sums without their products, and the weights of those."""
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
    """Adds rows of values."""
    zeros = sums.zeros
    if grid is not None:
        step, zero = grid
        weights = weights * step
        zeros = zeros + weights * zero
    factor = to_columns(plan, weights)
    halves = tuple(total + factor * half for total, half in zip(sums.halves, values, strict=True))
    return Sums(sums.largest, sums.weight, zeros, halves)
