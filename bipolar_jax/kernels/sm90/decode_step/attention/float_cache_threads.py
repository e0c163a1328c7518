"""What a thread does for the attention of one query, in the functions of `kernels.sm90.instructions` alone.

A warp has 16 positions, and the tensor core multiplies them: their keys with the query, and the transposed values with
their weights. Query and weights are float32, and the instructions have room for 8 columns where one is wanted: the
first three hold what adds up to the number, each a float of 16 bits. With bfloat16 the sums of the three are those of
float32; float16, which ends at 2^-24, is off by at most half of that for each weight or number of the query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value

PARTS = 3  # 16-bit floats that add up to a float32
_BLOCKS = 16  # of 8 numbers, in a vector of 128
_ROW_BYTES = 128  # of half a vector in shared memory, whose pieces of 16 bytes the swizzle exchanges


def split(number: str, x: Value) -> list[Value]:
    """Words whose low halves, "bf16" or "f16", add up to a float32."""
    words = []
    for _ in range(PARTS):
        words.append(ptx.rounded(number, x))
        x = ptx.subtract(x, ptx.expand(number, words[-1])[0])
    return words


def store_query(number: str, where: Pointer, thread: Value, x: Value, *, codes: bool = False) -> None:
    """Leaves number `thread` of a query where `load_query` finds it: for part n, and lanes' pairs q, 16 words.

    For keys as codes they are in the order in which `code_threads` has those.
    """
    if codes:  # number 16 j + 4 q + 2 i + h is the i-th of a pair in block 2 j + h
        pair, odd = ptx.bits_of(ptx.shift_right(thread, 2), 3), ptx.bits_of(ptx.shift_right(thread, 1), 1)
        block = ptx.plus(ptx.shift_left(ptx.shift_right(thread, 4), 1), ptx.bits_of(thread, 1))
    else:
        block, within = ptx.shift_right(thread, 3), ptx.bits_of(thread, 7)
        pair, odd = ptx.shift_right(within, 1), ptx.bits_of(within, 1)
    offset = ptx.plus(ptx.plus(ptx.shift_left(pair, 6), ptx.shift_left(block, 2)), ptx.shift_left(odd, 1))
    for n, word in enumerate(split(number, x)):
        ptx.store_half(ptx.advance(where, ptx.plus(offset, 4 * 4 * _BLOCKS * n)), word)


def load_query(where: Pointer, lane: Value) -> list[Value]:
    """The lane's words of the query as a matrix of 8 columns: of block i, numbers 2 q and 2 q + 1 of column lane / 4.

    Columns beyond the parts are 0.
    """
    column = ptx.shift_right(lane, 2)
    inside = ptx.less(column, PARTS)
    which = ptx.choose(inside, lane, ptx.bits_of(lane, 3))
    base = ptx.advance(where, ptx.shift_left(which, 6))
    words = [word for i in range(4) for word in ptx.load(ptx.advance(base, 16 * i), 4)]
    return [ptx.choose(inside, word, ptx.int32(0)) for word in words]


def scores(number: str, keys: Sequence[tuple[Value, Value]], query: Sequence[Value]) -> tuple[Value, Value]:
    """Products of the keys of rows lane / 4 and lane / 4 + 8 with the query, in all four lanes of a row.

    Args:
      number: "bf16" or "f16".
      keys: of every block of 8 columns, the lane's two numbers of both rows.
      query: of `load_query`.
    """
    return scores_of_tiles(number, ((i, [*keys[i], *keys[i + 1]]) for i in range(0, len(keys), 2)), query)


def scores_of_tiles(
    number: str, tiles: Iterable[tuple[int, list[Value]]], query: Sequence[Value]
) -> tuple[Value, Value]:
    """`scores` of two blocks at a time, from the one of that index on: of both the words of the two rows."""
    sums = [ptx.float32(0)] * 4
    for first, tile in tiles:
        sums = ptx.multiply_add_tiles(number, tile, list(query[first : first + 2]), sums)
    totals = [ptx.add(*sums[:2]), ptx.add(*sums[2:])]
    for distance in (1, 2):
        totals = [ptx.add(total, ptx.as_float(ptx.exchange(ptx.as_word(total), distance))) for total in totals]
    return tuple(totals)


def spread_weights(number: str, weights: Sequence[Value], lane: Value) -> list[Value]:
    """Weights of a warp's 16 positions as a matrix of 8 columns: 2 words, of positions 2 q and 2 q + 8 and the next.

    Args:
      number: "bf16" or "f16".
      weights: of rows lane / 4 and lane / 4 + 8.
      lane: of the warp.
    """
    pair, column = ptx.bits_of(lane, 3), ptx.smaller(ptx.shift_right(lane, 2), PARTS)
    first = ptx.plus(ptx.shift_left(pair, 3), column)  # the lane of position 2 q that has this column's part
    words = []
    for weight in weights:
        mine = ptx.int32(0)  # of part q; lanes of q = 3 have none
        for n, word in enumerate(split(number, weight)):
            mine = ptx.choose(ptx.equal(pair, n), word, mine)
        both = [ptx.from_lane(mine, lane) for lane in (first, ptx.plus(first, 4))]
        words.append(ptx.pick_bytes(*both, 0x5410))
    return words


def add_values(
    number: str, values: Pointer, weights: Sequence[Value], lane: Value, warp: Value, sums: Sequence[Value]
) -> list[Value]:
    """Adds weights . values of a warp's 16 positions and 64 numbers, in the columns of the weights.

    Args:
      number: "bf16" or "f16".
      values: shared memory, 64 positions of 64 numbers, in the 128-byte swizzle.
      weights: of `spread_weights`.
      lane, warp: of the warpgroup.
      sums: for every 16 numbers of the 64, 4 of them: columns 2 q and 2 q + 1 of numbers lane / 4 and lane / 4 + 8.
    """
    # Matrices of 8 positions and 8 numbers: both of the numbers, then again of the upper 8 positions.
    row = ptx.plus(ptx.bits_of(lane, 7), ptx.shift_left(ptx.shift_right(lane, 4), 3))
    row = ptx.plus(row, ptx.shift_left(warp, 4))
    piece = ptx.flip_bits(ptx.bits_of(ptx.shift_right(lane, 3), 1), ptx.bits_of(lane, 7))
    start = ptx.plus(ptx.times(row, _ROW_BYTES), ptx.shift_left(piece, 4))
    new = []
    for i in range(4):
        matrices = ptx.load_transposed(ptx.advance(values, ptx.flip_bits(start, i << 5)))
        new += ptx.multiply_add_tiles(number, matrices, list(weights), list(sums[4 * i : 4 * i + 4]))
    return new


def leave_sums(where: Pointer, sums: Sequence[Value], weight: Value, lane: Value, *, codes: bool = False) -> None:
    """Stores the sums over a warp's positions, times a weight: 64 numbers; lanes q = 0 and 1 have the parts.

    Of every 16 these are numbers lane / 4 and lane / 4 + 8; of codes, which are summed in pairs, 2 (lane / 4) and the
    next.
    """
    pair, row = ptx.bits_of(lane, 3), ptx.shift_right(lane, 2)
    odd = ptx.equal(pair, 1)
    shifts = (3, 2) if codes else (2, 5)
    target = ptx.advance(where, ptx.plus(*(ptx.shift_left(*term) for term in zip((row, pair), shifts, strict=True))))
    for i in range(0, len(sums), 4):
        totals = [ptx.add(*sums[i : i + 2]), ptx.add(*sums[i + 2 : i + 4])]
        totals = [ptx.add(total, ptx.as_float(ptx.exchange(ptx.as_word(total), 1))) for total in totals]
        number = ptx.as_word(ptx.multiply(ptx.choose(odd, totals[1], totals[0]), weight))
        with ptx.when(ptx.less(pair, 2)):
            ptx.store(ptx.advance(target, 16 * i), [number])
