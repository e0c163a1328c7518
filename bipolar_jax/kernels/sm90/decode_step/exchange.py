"""What warps and warpgroups of a block tell each other through shared memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import (
    ALONG_ROWS,
    K_SLICE_LAYOUT,
    SPLAT,
    VECTOR,
    WARPS,
    as_splat,
    lane_and_warp,
    numbers_of,
    tree,
    word_of,
)
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR
from bipolar_jax.kernels.sm90.decode_step.config import WARPGROUPS

# Threads that hold each element of an array in these layouts.
_COPIES = {VECTOR: 1, K_SLICE_LAYOUT: 1, ALONG_ROWS: 4}


def share(
    exchange,
    warpgroup: Int[Array, ""],
    values: Sequence[Float[Array, " n"]],
    kind: Literal["sum", "max", "min"],
    layout: plgpu.Layout = K_SLICE_LAYOUT,
    *,
    emulate: bool,
) -> None:
    """Every warp leaves the sum or an extreme of its part of some arrays in shared memory; `collect` reads them.

    Args:
      exchange: float32 [warps of the block].
      warpgroup: which this is.
      values: arrays in the layout VECTOR, K_SLICE_LAYOUT or ALONG_ROWS.
      kind: what is made of them; NaN of the max stays.
      layout: of the values.
    """
    if emulate:
        reduce = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}[kind]
        reduced = reduce(jnp.stack(values))
        for warp in range(WARPS):
            exchange[warpgroup * WARPS + warp] = reduced if kind != "sum" or warp == 0 else jnp.float32(0)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, *[layout] * len(values)))
    def inline(_, exchange, warpgroup, *values):
        numbers = [number for array in values for number in numbers_of(array)]
        if kind == "sum":
            number = tree(ptx.add, numbers)
            for distance in (1, 2, 4, 8, 16):
                number = ptx.add(number, ptx.as_float(ptx.exchange(ptx.as_word(number), distance)))
            word = ptx.as_word(ptx.multiply(number, ptx.float32(1 / _COPIES[layout])))
        else:
            extreme = tree(functools.partial(ptx.extreme, kind, "f32"), [ptx.as_word(number) for number in numbers])
            word = in_order(ptx.over_warp(kind, in_order(extreme)))
        lane, warp = lane_and_warp()
        with ptx.when(ptx.equal(lane, 0)):
            index = ptx.plus(ptx.times(warpgroup.registers.item(), WARPS), warp)
            ptx.store(ptx.advance_far(ptx.pointer(exchange, ptx.SHARED), index, 4), [word])

    inline(exchange, jnp.int32(warpgroup), *values)


def collect_own(exchange, warpgroup: Int[Array, ""], kind: Literal["max", "min"], *, emulate: bool) -> Float[Array, ""]:
    """An extreme of what the warps of this warpgroup left; it has been synchronized since."""
    if emulate:
        of_warps = exchange[pl.ds(warpgroup * WARPS, WARPS)]
        return jnp.max(of_warps) if kind == "max" else jnp.min(of_warps)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT), return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=SPLAT)
    )
    def inline(_, exchange, warpgroup):
        lane, _ = lane_and_warp()
        index = ptx.plus(ptx.times(warpgroup.registers.item(), WARPS), ptx.bits_of(lane, WARPS - 1))
        (word,) = ptx.load(ptx.advance_far(ptx.pointer(exchange, ptx.SHARED), index, 4), 1)
        return as_splat(ptx.as_float(in_order(ptx.over_warp(kind, in_order(word)))), None)

    return inline(exchange, jnp.int32(warpgroup))


def collect(exchange, kind: Literal["sum", "max", "min"], *, emulate: bool) -> Array:
    """The sum or an extreme of what the 16 warps of a block left; float32, or the sum of int32."""
    integers = exchange.dtype == jnp.int32
    if emulate:
        return {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}[kind](exchange[...])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), exchange.dtype, layout=SPLAT)
    )
    def inline(_, exchange):
        lane, _ = lane_and_warp()
        index = ptx.bits_of(lane, WARPGROUPS * WARPS - 1)
        (word,) = ptx.load(ptx.advance_far(ptx.pointer(exchange, ptx.SHARED), index, 4), 1)
        if kind != "sum":
            return as_splat(ptx.as_float(in_order(ptx.over_warp(kind, in_order(word)))), None)
        if integers:  # both halves of the warp have all of them
            return as_splat(ptx.shift_right_signed(ptx.over_warp("add", word), 1), True)
        number = ptx.as_float(word)
        for distance in (1, 2, 4, 8):
            number = ptx.add(number, ptx.as_float(ptx.exchange(ptx.as_word(number), distance)))
        return as_splat(number, None)

    return inline(exchange)


def in_order(word: ir.Value) -> ir.Value:
    """A float's word as an integer of the same order, and back; NaN beyond the infinities."""
    return ptx.flip_bits(word, ptx.bits_of(ptx.shift_right_signed(word, 31), 0x7FFFFFFF))


def write_products(
    target, sums: Int[Array, "64 8"], weights: Sequence[int], start: Int[Array, ""], *, emulate: bool
) -> None:
    """target[start + r] = sum over planes q of x of their weights and sums[r, q], for 32 rows.

    Args:
      target: int32 in shared memory, flat.
      sums: in the layout ACCUMULATOR; of the 64 rows 32 count.
      weights: of the planes of x, at most 8; what the other columns hold does not matter.
      start: in the target.
    """
    columns = [*weights, *[0] * (8 - len(weights))]
    if emulate:
        target[pl.ds(start, 32)] = sum(sums[:32, q] * weight for q, weight in enumerate(columns) if weight)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, ACCUMULATOR))
    def inline(_, target, start, sums):
        lane, warp = lane_and_warp()
        pair = ptx.bits_of(lane, 3)
        # A thread has columns 2 pair and 2 pair + 1 of rows lane / 4 and lane / 4 + 8 of its warp's 16.
        weights = [_pick(pair, columns[i::2]) for i in range(2)]
        totals = [
            ptx.plus(*(ptx.times(word_of(number), w) for number, w in zip(half, weights, strict=True)))
            for half in sums.registers.reshape(2, 2)
        ]
        for distance in (1, 2):
            totals = [ptx.plus(total, ptx.exchange(total, distance)) for total in totals]
        row = ptx.plus(ptx.plus(ptx.times(warp, 16), ptx.shift_right(lane, 2)), start.registers.item())
        with ptx.when(arith.andi(ptx.equal(pair, 0), ptx.less(warp, 2))):
            where = ptx.advance_far(ptx.pointer(target, ptx.SHARED), row, 4)
            ptx.store(where, totals[:1])
            ptx.store(ptx.advance(where, 32), totals[1:])

    inline(target, jnp.int32(start), sums)


def _pick(index, numbers: Sequence[int]):
    """numbers[index]."""
    value = ptx.int32(numbers[0])
    for i, number in enumerate(numbers[1:], 1):
        value = ptx.choose(ptx.equal(index, i), ptx.int32(number), value)
    return value
