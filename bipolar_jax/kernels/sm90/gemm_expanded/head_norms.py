"""RMSNorm of each head of queries and keys of prompts, in accumulators whose columns are tokens."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import as_integer
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    MATRIX,
    SPLAT,
    WARPS,
    as_array,
    lane_and_warp,
    numbers_of,
    scalar_of,
    thread_index,
    tree,
)
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value

_TOKENS = 64
HALF_SHAPE = (64, _TOKENS)  # numbers of half a head of 128, by tokens
SUMS_SHAPE = (WARPS + 1, _TOKENS)  # float32 in shared memory: squares by warp, and the factors of tokens
_SIZE = 2 * HALF_SHAPE[0]
_ROW_BYTES = 4 * _TOKENS
_HALF_TYPE = plgpu.ShapeDtypeStruct(HALF_SHAPE, jnp.float32, layout=MATRIX)


def _normalize_heads_twin(halves, gains, is_key, eps, sums):
    head = jnp.concatenate(halves)
    gain = jnp.where(is_key, *(ref[...].astype(jnp.float32) for ref in reversed(gains)))
    head = head * lax.rsqrt(jnp.mean(head * head, axis=0, keepdims=True) + eps) * gain[:, None]
    return [head[: HALF_SHAPE[0]], head[HALF_SHAPE[0] :]]


@with_twin(_normalize_heads_twin)
def normalize_heads(
    halves: list[Float[Array, "64 64"]], gains: tuple[Any, Any], is_key: Bool[Array, ""], eps: float, sums: Any
) -> list[Float[Array, "64 64"]]:
    """A head's numbers times its gains, divided by the root mean square of its token; the warpgroup meets twice.

    Args:
      halves: of the head of 64 tokens, in the layout MATRIX: numbers are rows.
      gains: of queries and of keys, refs in global memory, [128] of bfloat16 or float32.
      is_key: which of them are taken.
      eps: added to the mean square.
      sums: shared memory of this warpgroup, float32 SUMS_SHAPE.
    """
    itemsize = jnp.dtype(gains[0].dtype).itemsize

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, MATRIX, plgpu.RefType(), plgpu.RefType(), SPLAT, plgpu.RefType()),
        return_type=(_HALF_TYPE, _HALF_TYPE),
    )
    def inline(_, first, second, query_gains, key_gains, is_key, sums):
        pointers = [ptx.pointer(gains, ptx.GLOBAL) for gains in (query_gains, key_gains)]
        takes_key, sums = ptx.equal(scalar_of(is_key), 1), ptx.pointer(sums, ptx.SHARED)
        numbers = [numbers_of(half) for half in (first, second)]
        halves = normalized_numbers(numbers, pointers, itemsize, takes_key, eps, sums)
        return tuple(as_array(half, HALF_SHAPE, MATRIX) for half in halves)

    return list(inline(*halves, *gains, as_integer(is_key), sums))


def normalized_numbers(
    numbers: list[list[Value]], gains: list[Pointer], itemsize: int, takes_key: Value, eps: float, sums: Pointer
) -> list[list[Value]]:
    """What a thread does of `normalize_heads`: its numbers of both halves, in the order of `_places`."""
    factors, (lane, warp) = _factors(numbers, eps, sums), lane_and_warp()
    row = ptx.plus(ptx.times(warp, 16), ptx.shift_right(lane, 2))
    normalized = []
    for half in range(2):
        own = []  # gains of the thread's two rows
        for row_of_warp in range(2):
            element = ptx.plus(row, HALF_SHAPE[0] * half + 8 * row_of_warp)
            of_query, of_key = (_load_number(ptx.advance_far(ptr, element, itemsize), itemsize) for ptr in gains)
            own.append(ptx.as_float(ptx.choose(takes_key, of_key, of_query)))
        normalized.append(
            [
                ptx.multiply(ptx.multiply(number, own[row_of_warp]), factors[column])
                for number, (column, row_of_warp) in zip(numbers[half], _places(), strict=True)
            ]
        )
    return normalized


def _places() -> list[tuple[int, int]]:
    """Of a thread's numbers of half a head: the index of the column among its own, and of the row."""
    return [(2 * block + i, row) for block in range(_TOKENS // 8) for row in range(2) for i in range(2)]


def _factors(numbers: list[list[Value]], eps: float, sums: Pointer) -> list[Value]:
    """1 / root mean square, for each of the thread's columns: two neighbours in every eight."""
    lane, warp = lane_and_warp()
    squares = [[] for _ in range(_TOKENS // 4)]
    for half in numbers:
        for number, (column, _) in zip(half, _places(), strict=True):
            squares[column].append(number)
    totals = []
    for column in squares:
        total = tree(ptx.add, [ptx.multiply(number, number) for number in column])
        for distance in (4, 8, 16):  # lanes that hold other rows of the same columns
            total = ptx.add(total, ptx.as_float(ptx.exchange(ptx.as_word(total), distance)))
        totals.append(ptx.as_word(total))
    first = ptx.advance_far(sums, ptx.bits_of(lane, 3), 8)

    with ptx.when(ptx.less(lane, 4)):
        of_warp = ptx.advance_far(first, warp, _ROW_BYTES)
        for block in range(_TOKENS // 8):
            ptx.store(ptx.advance(of_warp, 32 * block), totals[2 * block : 2 * block + 2])
    ptx.synchronize()
    thread = thread_index()
    with ptx.when(ptx.less(thread, _TOKENS)):
        column = ptx.advance_far(sums, thread, 4)
        by_warp = [ptx.load(ptx.advance(column, _ROW_BYTES * warp), 1)[0] for warp in range(WARPS)]
        total = tree(ptx.add, [ptx.as_float(word) for word in by_warp])
        mean = ptx.fma(total, ptx.float32(1 / _SIZE), ptx.float32(eps))
        ptx.store(ptx.advance(column, _ROW_BYTES * WARPS), [ptx.as_word(ptx.rsqrt(mean))])
    ptx.synchronize()
    words = [ptx.load(ptx.advance(first, _ROW_BYTES * WARPS + 32 * block), 2) for block in range(_TOKENS // 8)]
    return [ptx.as_float(word) for pair in words for word in pair]


def _load_number(pointer: Pointer, itemsize: int) -> Value:
    """The bits of a float32, or of a bfloat16 as a float32."""
    return ptx.shift_left(ptx.load_half(pointer), 16) if itemsize == 2 else ptx.load(pointer, 1)[0]
