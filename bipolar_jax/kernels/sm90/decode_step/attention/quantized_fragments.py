"""Attention of one query to codes of 8 or 4 bits: the code of one thread, written in the functions of `core.ptx` alone.

As `float_fragments`, with codes widened in registers: to signed ones, code - 2^(bits - 1), which bfloat16 holds
exactly. Scales and zeros are applied to scores and weights by the caller. Sums may be in any order, so bytes are
unpacked in the order that is cheapest: bytes 0 and 2 of a word make one pair of floats, bytes 1 and 3 another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_step.attention import float_fragments

NUMBER = "bf16"
_SEGMENT = 16  # bytes that the swizzle moves as one
_ONES = 0x3F803F80  # two bfloat16


def pairs(bits: int, word: Value) -> list[Value]:
    """The signed codes of a word, in pairs: of bytes 0 and 2, and 1 and 3; of 4 bits the high nibbles' pairs last."""
    if bits == 8:
        return [_signed_bytes(word), _signed_bytes(ptx.shift_right(word, 8))]
    # 0x4300 is 128, with units in the last place: 128 + code, less 128 + 8.
    return [
        ptx.fma_pairs(
            NUMBER,
            ptx.masked_or(ptx.shift_right(word, shift), 0x000F000F, 0x43004300),
            ptx.int32(_ONES),
            ptx.int32(0xC308C308),
        )
        for shift in (0, 8, 4, 12)
    ]


def _signed_bytes(word: Value) -> Value:
    """Of bytes 0 and 2: 128 + the low seven bits, less 128 where the highest bit is set, else less 256."""
    lower = ptx.masked_or(word, 0x007F007F, 0x43004300)
    less = ptx.flip_bits(ptx.bits_of(word, 0x00800080), 0xC380C380)
    return ptx.fma_pairs(NUMBER, lower, ptx.int32(_ONES), less)


def scores(bits: int, keys: Pointer, query: Sequence[Value], lane: Value, warp: Value) -> tuple[Value, Value]:
    """Products of the keys' signed codes of rows lane / 4 and lane / 4 + 8 with the query, in all four lanes of a row.

    Args:
      bits: 8 or 4.
      keys: shared memory, 64 positions, in the swizzle of their width.
      query: from `float_fragments.load_query`, stored for codes.
      lane, warp: of the warpgroup.
    """
    width, row = len(query) * bits, ptx.shift_right(lane, 2)  # a word of the query for every 8 elements
    segments = width // _SEGMENT
    start = ptx.plus(_row_start(width, row, warp), ptx.shift_left(ptx.bits_of(lane, 3), 2))

    def tiles() -> Iterator[tuple[int, list[Value]]]:
        """Each is made just before it is multiplied: all of them at once would take too many registers."""
        for segment in range(segments):
            pointer = ptx.advance(keys, ptx.flip_bits(start, segment * _SEGMENT))
            of_rows = [pairs(bits, ptx.load(ptx.advance(pointer, below * width), 1)[0]) for below in (0, 8)]
            for half in range(8 // bits):  # high nibbles are the second half of the vector
                yield 2 * (segments * half + segment), [of_row[2 * half + i] for i in range(2) for of_row in of_rows]

    return float_fragments.scores_of_tiles(NUMBER, tiles(), query)


def query_sum(query: Sequence[Value]) -> Value:
    """The sum of a query's elements, added up as `scores` does."""
    ones = (ptx.int32(_ONES),) * 2
    return float_fragments.scores(NUMBER, [ones] * len(query), query)[0]


def add_values(
    bits: int, values: Pointer, weights: Sequence[Value], lane: Value, warp: Value, sums: Sequence[Value]
) -> list[Value]:
    """Adds weights . signed codes of a warp's 16 positions, in the columns of the weights.

    Args:
      bits: 8 or 4.
      values: shared memory, 64 positions, in the swizzle of their width.
      weights: from `float_fragments.spread_weights`.
      lane, warp: of the warpgroup.
      sums: for every 16 elements, 4 sums: columns 2 q and 2 q + 1 of elements 2 (lane / 4) and the next.
    """
    # Matrices of ldmatrix: 8 positions by the 8 byte pairs of a segment; lower and upper positions, then the next one.
    width, row = len(sums) // 2 * bits, ptx.plus(ptx.bits_of(lane, 7), ptx.bits_of(lane, 8))
    start = ptx.flip_bits(_row_start(width, row, warp), ptx.bits_of(lane, 16))
    new = list(sums)
    for segment in range(0, width // _SEGMENT, 2):
        matrices = ptx.load_transposed(ptx.advance(values, ptx.flip_bits(start, segment * _SEGMENT)))
        for i in range(2):
            of_positions = [pairs(bits, word) for word in matrices[2 * i : 2 * i + 2]]
            for half in range(8 // bits):
                tile = [pair for eight in of_positions for pair in eight[2 * half : 2 * half + 2]]
                first = 4 * (width // _SEGMENT * half + segment + i)
                new[first : first + 4] = ptx.multiply_add_tiles(NUMBER, tile, list(weights), new[first : first + 4])
    return new


def _row_start(width: int, row: Value, warp: Value) -> Value:
    """Offset of the segment 0 of a row of a warp; `flip_bits` with 16 s gives that of segment s.

    The swizzle XORs the segment's index with the row's among 8 where rows have a width of 128 bytes, with half of that
    where they have 64, and with a quarter where they have 32.
    """
    shift = {128: 0, 64: 1, 32: 2}[width]
    swizzle = ptx.bits_of(ptx.shift_right(row, shift) if shift else row, width // _SEGMENT - 1)
    row = ptx.plus(row, ptx.shift_left(warp, 4))
    return ptx.plus(ptx.times(row, width), ptx.shift_left(swizzle, 4))
