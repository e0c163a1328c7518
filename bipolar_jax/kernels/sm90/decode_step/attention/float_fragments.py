"""Attention of one query to 16-bit floats: the code of one thread, written in the functions of `core.ptx` alone.

The tensor core (mma.m16n8k16) multiplies a warp's 16 positions: keys with the query, transposed values with weights.
Query and weights are float32, and the instruction has 8 columns where one is needed: the first three hold 16-bit terms
that add up to the float32. With bfloat16 the three are exact. float16 ends at 2^-24: each weight or element of the
query is off by at most half of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value

TERMS = 3  # 16-bit floats that add up to a float32
BLOCK = 8  # elements of a query that a thread has a word of
_BLOCKS = 16  # there is room for, in a stored query
_ROW_BYTES = 128  # of 64 elements in shared memory; the swizzle permutes its 16-byte segments


def split(number: str, x: Value) -> list[Value]:
    """The TERMS, "bf16" or "f16", that add up to a float32: each in the low half of a word."""
    words = []
    for _ in range(TERMS):
        words.append(ptx.rounded(number, x))
        x = ptx.subtract(x, ptx.expand(number, words[-1])[0])
    return words


def store_query(number: str, target: Pointer, thread: Value, x: Value, *, codes: bool = False) -> None:
    """Stores element `thread` of a query for `load_query`: 16 words for each term and each pair index q = lane % 4.

    Args:
      number: "bf16" or "f16".
      target: shared memory.
      thread: index in the warpgroup.
      x: the element, float32.
      codes: for keys in codes, whose elements `quantized_fragments` has in another order.
    """
    if codes:  # element 16 j + 4 q + 2 i + h is the i-th of pair q in block 2 j + h
        pair, odd = ptx.bits_of(ptx.shift_right(thread, 2), 3), ptx.bits_of(ptx.shift_right(thread, 1), 1)
        block = ptx.plus(ptx.shift_left(ptx.shift_right(thread, 4), 1), ptx.bits_of(thread, 1))
    else:
        block, in_block = ptx.shift_right(thread, 3), ptx.bits_of(thread, 7)
        pair, odd = ptx.shift_right(in_block, 1), ptx.bits_of(in_block, 1)
    offset = ptx.plus(ptx.plus(ptx.shift_left(pair, 6), ptx.shift_left(block, 2)), ptx.shift_left(odd, 1))
    for n, word in enumerate(split(number, x)):
        ptx.store_half(ptx.advance(target, ptx.plus(offset, 4 * 4 * _BLOCKS * n)), word)


def load_query(source: Pointer, lane: Value, blocks: int = _BLOCKS) -> list[Value]:
    """The lane's fragments of the query as a matrix of 8 columns: word i has elements 2 q and 2 q + 1 of block i.

    They are those of column lane / 4; columns beyond the terms are 0.
    """
    column = ptx.shift_right(lane, 2)
    inside = ptx.less(column, TERMS)
    index = ptx.choose(inside, lane, ptx.bits_of(lane, 3))
    base = ptx.advance(source, ptx.shift_left(index, 6))
    words = [word for i in range(blocks // 4) for word in ptx.load(ptx.advance(base, 16 * i), 4)]
    return [ptx.choose(inside, word, ptx.int32(0)) for word in words]


def scores(number: str, keys: Sequence[tuple[Value, Value]], query: Sequence[Value]) -> tuple[Value, Value]:
    """Products of the keys of rows lane / 4 and lane / 4 + 8 with the query, in all four lanes of a row.

    Args:
      number: "bf16" or "f16".
      keys: for every block of 8 columns, the lane's pair of elements of both rows.
      query: from `load_query`.
    """
    return scores_of_tiles(number, ((i, [*keys[i], *keys[i + 1]]) for i in range(0, len(keys), 2)), query)


def scores_of_tiles(
    number: str, tiles: Iterable[tuple[int, list[Value]]], query: Sequence[Value]
) -> tuple[Value, Value]:
    """`scores`, from tiles of two blocks: the index of the first block, and for each block the words of both rows."""
    sums = [ptx.float32(0)] * 4
    for first, tile in tiles:
        sums = ptx.multiply_add_tiles(number, tile, list(query[first : first + 2]), sums)
    totals = [ptx.add(*sums[:2]), ptx.add(*sums[2:])]
    for distance in (1, 2):
        totals = [ptx.add(total, ptx.as_float(ptx.exchange(ptx.as_word(total), distance))) for total in totals]
    return tuple(totals)


def spread_weights(number: str, weights: Sequence[Value], lane: Value) -> list[Value]:
    """Fragments of the weights of a warp's 16 positions, as a matrix of 8 columns: those of positions 2 q, 2 q + 8.

    Args:
      number: "bf16" or "f16".
      weights: of rows lane / 4 and lane / 4 + 8.
      lane: of the warp.
    """
    pair, column = ptx.bits_of(lane, 3), ptx.smaller(ptx.shift_right(lane, 2), TERMS)
    first = ptx.plus(ptx.shift_left(pair, 3), column)  # the lane that has position 2 q and this column's term
    words = []
    for weight in weights:
        term = ptx.int32(0)  # term q; lanes of q = 3 have none
        for n, word in enumerate(split(number, weight)):
            term = ptx.choose(ptx.equal(pair, n), word, term)
        two_positions = [ptx.from_lane(term, lane) for lane in (first, ptx.plus(first, 4))]
        words.append(ptx.pick_bytes(*two_positions, 0x5410))
    return words


def add_values(
    number: str, values: Pointer, weights: Sequence[Value], lane: Value, warp: Value, sums: Sequence[Value]
) -> list[Value]:
    """Adds weights . values of a warp's 16 positions and 64 elements, in the columns of the weights.

    Args:
      number: "bf16" or "f16".
      values: shared memory, 64 positions of 64 elements, in the 128-byte swizzle.
      weights: from `spread_weights`.
      lane, warp: of the warpgroup.
      sums: for every 16 of the 64 elements, 4 sums: columns 2 q and 2 q + 1 of elements lane / 4 and lane / 4 + 8.
    """
    # 8 x 8 matrices of ldmatrix: both halves of the 16 elements at the lower 8 positions, then at the upper 8.
    row = ptx.plus(ptx.bits_of(lane, 7), ptx.shift_left(ptx.shift_right(lane, 4), 3))
    row = ptx.plus(row, ptx.shift_left(warp, 4))
    segment = ptx.flip_bits(ptx.bits_of(ptx.shift_right(lane, 3), 1), ptx.bits_of(lane, 7))
    start = ptx.plus(ptx.times(row, _ROW_BYTES), ptx.shift_left(segment, 4))
    new = []
    for i in range(4):
        matrices = ptx.load_transposed(ptx.advance(values, ptx.flip_bits(start, i << 5)))
        new += ptx.multiply_add_tiles(number, matrices, list(weights), list(sums[4 * i : 4 * i + 4]))
    return new


def store_sums(target: Pointer, sums: Sequence[Value], weight: Value, lane: Value, *, codes: bool = False) -> None:
    """Stores 64 sums over a warp's positions, times a weight; lanes of q = 0 and 1 hold the terms' columns.

    Of every 16 elements a lane has lane / 4 and lane / 4 + 8; of codes, which are summed in pairs, 2 (lane / 4) and the
    next.
    """
    pair, row = ptx.bits_of(lane, 3), ptx.shift_right(lane, 2)
    odd = ptx.equal(pair, 1)
    shifts = (3, 2) if codes else (2, 5)
    first = ptx.advance(target, ptx.plus(*(ptx.shift_left(*term) for term in zip((row, pair), shifts, strict=True))))
    for i in range(0, len(sums), 4):
        totals = [ptx.add(*sums[i : i + 2]), ptx.add(*sums[i + 2 : i + 4])]
        totals = [ptx.add(total, ptx.as_float(ptx.exchange(ptx.as_word(total), 1))) for total in totals]
        number = ptx.as_word(ptx.multiply(ptx.choose(odd, totals[1], totals[0]), weight))
        with ptx.when(ptx.less(pair, 2)):
            ptx.store(ptx.advance(first, 16 * i), [number])
