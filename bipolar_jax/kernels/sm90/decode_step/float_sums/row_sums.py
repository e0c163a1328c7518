"""Float32 sums of the rows of a part: what the warps of a warpgroup add up, and hand to the epilogue.

A thread has four numbers: 2 b + p of lane 4 r + q belongs to row 16 b + 8 p + r, and all four lanes q have the same.
Each warp stores its sums in shared memory; the epilogue adds them up in the order of the warps, so that the result does
not depend on which of them came first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    SPLAT,
    VECTOR,
    WARPS,
    as_vector,
    lane_and_warp,
    numbers_of,
    scalar_of,
    thread_index,
    tree,
)
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import WARPGROUPS
from bipolar_jax.packing.fields import PART_ROWS

ROWS_OF_LANE = 4
BLOCK_ROWS = PART_ROWS // 2
_SIZE = WARPGROUP * ROWS_OF_LANE
ROW_SUMS = plgpu.Layout.WG_STRIDED((_SIZE,), vec_size=ROWS_OF_LANE)  # of a warpgroup: four numbers a thread
RowSums = Float[Array, "512"]


def zeros() -> RowSums:
    """Sums to begin a part with."""
    return plgpu.layout_cast(jnp.zeros(_SIZE, jnp.float32), ROW_SUMS)


def spread_rows(by_warp: Float[Array, "warps rows"]) -> RowSums:
    """Sums of a part's rows of every warp as its threads have them, in jnp."""
    by_lane = by_warp.reshape(WARPS, 2, 2, 8).transpose(0, 3, 1, 2)[:, :, None]
    return jnp.broadcast_to(by_lane, (WARPS, 8, 4, 2, 2)).reshape(-1)


def _store_sums_twin(sums, total, start, block_stride):
    by_row = total.reshape(WARPS, 8, 4, 2, 2)[:, :, 0].transpose(0, 2, 3, 1).reshape(WARPS, 2, BLOCK_ROWS)
    for block in range(2):
        sums[:, pl.ds(start + block * block_stride, BLOCK_ROWS)] = by_row[:, block]


@with_twin(_store_sums_twin)
def store_sums(sums: Any, total: RowSums, start: Int[Array, ""], block_stride: int) -> None:
    """sums[w, start + block_stride b + i] = the sum of warp w for row 16 b + i of the part, i below 16.

    Args:
      sums: of the warpgroup in shared memory, float32 [warps, rows].
      total: of its warps.
    """
    rows = sums.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW_SUMS, SPLAT))
    def inline(_, sums, total, start):
        store_sums_of_warp(ptx.pointer(sums, ptx.SHARED), numbers_of(total), scalar_of(start), block_stride, rows)

    inline(sums, total, jnp.int32(start))


def _take_twin(sums, start, count):
    total = jnp.sum(sums[:, :, pl.ds(start, WARPGROUP)], axis=(0, 1))
    return jnp.where(lax.iota(jnp.int32, WARPGROUP) < count, total, 0)


@with_twin(_take_twin)
def take(sums: Any, start: Int[Array, ""] | int, count: int) -> Float[Array, "128"]:
    """The sums over all warps of the first `count` of 128 rows from `start` on; 0 for the others.

    Args:
      sums: shared memory, float32 [warpgroups, warps, rows].
    """
    rows = sums.shape[2]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
    )
    def inline(_, sums, start):
        first = ptx.pointer(sums, ptx.SHARED)
        return as_vector(take_of_thread(first, thread_index(), scalar_of(start), count, rows), jnp.float32)

    return inline(sums, jnp.int32(start))


# Below: for use within `plgpu.inline_mgpu`.


def store_sums_of_warp(sums: Pointer, total: Sequence[Value], start: Value, block_stride: int, rows: int) -> None:
    """The thread's part of `store_sums`: lane 4 r + 2 b + p stores row 16 b + 8 p + r."""
    lane, warp = lane_and_warp()
    block, half = ptx.bits_of(ptx.shift_right(lane, 1), 1), ptx.bits_of(lane, 1)
    in_block = [ptx.choose(ptx.equal(half, 1), total[2 * b + 1], total[2 * b]) for b in range(2)]
    number = ptx.choose(ptx.equal(block, 1), in_block[1], in_block[0])
    row = ptx.plus(ptx.plus(ptx.times(block, block_stride), ptx.times(half, 8)), ptx.shift_right(lane, 2))
    index = ptx.plus(ptx.plus(start, row), ptx.times(warp, rows))
    ptx.store(ptx.advance_far(sums, index, 4), [ptx.as_word(number)])


def take_of_thread(sums: Pointer, thread: Value, start: Value, count: int, rows: int) -> Value:
    """The thread's number of `take`, as a word."""
    mine = ptx.advance_far(sums, ptx.plus(start, thread), 4)

    def total() -> list[Value]:
        words = [ptx.load(ptx.advance(mine, 4 * rows * warp), 1)[0] for warp in range(WARPGROUPS * WARPS)]
        return [ptx.as_word(tree(ptx.add, [ptx.as_float(word) for word in words]))]

    (word,) = ptx.update_if(ptx.less(thread, count), [ptx.int32(0)], total)
    return ptx.as_float(word)
