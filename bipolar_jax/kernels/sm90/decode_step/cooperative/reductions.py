"""Reductions over a block: every warp stores its result in shared memory; after a barrier all threads combine them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    ALONG_ROWS,
    K_SLICE_LAYOUT,
    SPLAT,
    VECTOR,
    WARPS,
    as_splat,
    lane_and_warp,
    numbers_of,
    scalar_of,
    tree,
)
from bipolar_jax.kernels.sm90.core.hardware import WARP
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import WARPGROUPS

Kind = Literal["sum", "max", "min"]
BLOCK_WARPS = WARPGROUPS * WARPS
_REDUCE = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}
# Threads that hold a copy of each element of an array in these layouts.
_COPIES = {VECTOR: 1, K_SLICE_LAYOUT: 1, ALONG_ROWS: 4}


def _reduce_warps_twin(results, warpgroup, values, kind, layout=K_SLICE_LAYOUT):
    reduced = _REDUCE[kind](jnp.stack(values))
    for warp in range(WARPS):
        results[warpgroup * WARPS + warp] = reduced if kind != "sum" or warp == 0 else jnp.float32(0)


@with_twin(_reduce_warps_twin)
def reduce_warps(
    results,
    warpgroup: Int[Array, ""],
    values: Sequence[Float[Array, " n"]],
    kind: Kind,
    layout: plgpu.Layout = K_SLICE_LAYOUT,
) -> None:
    """Every warp reduces the elements that its threads hold, and stores the result for `reduce_block`.

    Args:
      results: shared memory, float32 [BLOCK_WARPS].
      warpgroup: of the calling threads.
      values: arrays in the layout VECTOR, K_SLICE_LAYOUT or ALONG_ROWS.
      kind: a NaN survives "max".
      layout: of the values.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, *[layout] * len(values)))
    def inline(_, results, warpgroup, *values):
        numbers = [number for array in values for number in numbers_of(array)]
        if kind == "sum":
            number = _over_lanes(tree(ptx.add, numbers), WARP)
            word = ptx.as_word(ptx.multiply(number, ptx.float32(1 / _COPIES[layout])))
        else:
            extreme = tree(functools.partial(ptx.extreme, kind, "f32"), [ptx.as_word(number) for number in numbers])
            word = ordered_bits(ptx.over_warp(kind, ordered_bits(extreme)))
        lane, warp = lane_and_warp()
        with ptx.when(ptx.equal(lane, 0)):
            index = ptx.plus(ptx.times(scalar_of(warpgroup), WARPS), warp)
            ptx.store(ptx.advance_far(ptx.pointer(results, ptx.SHARED), index, 4), [word])

    inline(results, jnp.int32(warpgroup), *values)


def reduce_warpgroup(results, warpgroup: Int[Array, ""], kind: Kind) -> Float[Array, ""]:
    """The sum or extreme over the warps of this warpgroup, after `reduce_warps` and a barrier of the warpgroup."""
    return reduce_warpgroups(results, warpgroup, 1, kind)


def reduce_block(results, kind: Kind) -> Array:
    """The sum or extreme over the warps of the block, after each has stored its result and a barrier of the block."""
    return reduce_warpgroups(results, 0, WARPGROUPS, kind)


def _reduce_warpgroups_twin(results, first, count, kind):
    return _REDUCE[kind](results[pl.ds(first * WARPS, count * WARPS)])


@with_twin(_reduce_warpgroups_twin)
def reduce_warpgroups(results, first: Int[Array, ""] | int, count: int, kind: Kind) -> Array:
    """The sum or extreme over the warps of some warpgroups, after each has stored its result and a barrier of them.

    Args:
      results: shared memory, [BLOCK_WARPS] or more, of float32, or of int32 for a sum.
      first: of the warpgroups.
      count: of the warpgroups, a power of two.
      kind: of the reduction.
    """
    integers, warps = results.dtype == jnp.int32, count * WARPS

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT), return_type=plgpu.ShapeDtypeStruct((), results.dtype, layout=SPLAT)
    )
    def inline(_, results, first):
        lane, _ = lane_and_warp()
        index = ptx.bits_of(lane, warps - 1)
        if count < WARPGROUPS:
            index = ptx.plus(ptx.times(scalar_of(first), WARPS), index)
        (word,) = ptx.load(ptx.advance_far(ptx.pointer(results, ptx.SHARED), index, 4), 1)
        if kind != "sum":
            return as_splat(ptx.as_float(ordered_bits(ptx.over_warp(kind, ordered_bits(word)))), None)
        if integers:  # the warp holds WARP / warps copies of the results
            copies = WARP // warps
            return as_splat(ptx.shift_right_signed(ptx.over_warp("add", word), copies.bit_length() - 1), True)
        return as_splat(_over_lanes(ptx.as_float(word), warps), None)

    return inline(results, jnp.int32(first))


def _over_lanes(number: Value, count: int) -> Value:
    """The sum over `count` neighbouring lanes, a power of two."""
    for distance in (1 << i for i in range(count.bit_length() - 1)):
        number = ptx.add(number, ptx.as_float(ptx.exchange(ptx.as_word(number), distance)))
    return number


def ordered_bits(word: Value) -> Value:
    """A float32's bits as an int32 of the same order, and back; NaN comes beyond the infinities."""
    return ptx.flip_bits(word, ptx.bits_of(ptx.shift_right_signed(word, 31), 0x7FFFFFFF))
