"""What a thread does for the attention of one query, in the functions of `kernels.sm90.instructions` alone.

A warp has 16 positions, and the tensor core multiplies them: their keys with the query, and the transposed values with
their weights. Query and weights are float32, and the instructions have room for 8 columns where one is wanted: the
first three hold what adds up to the number, each a float of 16 bits. With bfloat16 the sums of the three are those of
float32; float16, which ends at 2^-24, is off by at most half of that for each weight or number of the query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.instructions import Pointer, Value

PARTS = 3  # 16-bit floats that add up to a float32
_BLOCKS = 16  # of 8 numbers, in a vector of 128
_ROW_BYTES = 128  # of half a vector in shared memory, whose pieces of 16 bytes the swizzle exchanges


def split(number: str, x: Value) -> list[Value]:
    """Words whose low halves, "bf16" or "f16", add up to a float32."""
    words = []
    for _ in range(PARTS):
        words.append(gpu.rounded(number, x))
        x = gpu.subtract(x, gpu.expand(number, words[-1])[0])
    return words


def store_query(number: str, where: Pointer, thread: Value, x: Value, *, codes: bool = False) -> None:
    """Leaves number `thread` of a query where `load_query` finds it: for part n, and lanes' pairs q, 16 words.

    For keys as codes they are in the order in which `code_threads` has those.
    """
    if codes:  # number 16 j + 4 q + 2 i + h is the i-th of a pair in block 2 j + h
        pair, odd = gpu.bits_of(gpu.shift_right(thread, 2), 3), gpu.bits_of(gpu.shift_right(thread, 1), 1)
        block = gpu.plus(gpu.shift_left(gpu.shift_right(thread, 4), 1), gpu.bits_of(thread, 1))
    else:
        block, within = gpu.shift_right(thread, 3), gpu.bits_of(thread, 7)
        pair, odd = gpu.shift_right(within, 1), gpu.bits_of(within, 1)
    offset = gpu.plus(gpu.plus(gpu.shift_left(pair, 6), gpu.shift_left(block, 2)), gpu.shift_left(odd, 1))
    for n, word in enumerate(split(number, x)):
        gpu.store_half(gpu.advance(where, gpu.plus(offset, 4 * 4 * _BLOCKS * n)), word)


def load_query(where: Pointer, lane: Value) -> list[Value]:
    """The lane's words of the query as a matrix of 8 columns: of block i, numbers 2 q and 2 q + 1 of column lane / 4.

    Columns beyond the parts are 0.
    """
    column = gpu.shift_right(lane, 2)
    inside = gpu.less(column, PARTS)
    which = gpu.choose(inside, lane, gpu.bits_of(lane, 3))
    base = gpu.advance(where, gpu.shift_left(which, 6))
    words = [word for i in range(4) for word in gpu.load(gpu.advance(base, 16 * i), 4)]
    return [gpu.choose(inside, word, gpu.int32(0)) for word in words]


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
    sums = [gpu.float32(0)] * 4
    for first, tile in tiles:
        sums = gpu.multiply_add_tiles(number, tile, list(query[first : first + 2]), sums)
    totals = [gpu.add(*sums[:2]), gpu.add(*sums[2:])]
    for distance in (1, 2):
        totals = [gpu.add(total, gpu.as_float(gpu.exchange(gpu.as_word(total), distance))) for total in totals]
    return tuple(totals)


def spread_weights(number: str, weights: Sequence[Value], lane: Value) -> list[Value]:
    """Weights of a warp's 16 positions as a matrix of 8 columns: 2 words, of positions 2 q and 2 q + 8 and the next.

    Args:
      number: "bf16" or "f16".
      weights: of rows lane / 4 and lane / 4 + 8.
      lane: of the warp.
    """
    pair, column = gpu.bits_of(lane, 3), gpu.smaller(gpu.shift_right(lane, 2), PARTS)
    first = gpu.plus(gpu.shift_left(pair, 3), column)  # the lane of position 2 q that has this column's part
    words = []
    for weight in weights:
        mine = gpu.int32(0)  # of part q; lanes of q = 3 have none
        for n, word in enumerate(split(number, weight)):
            mine = gpu.choose(gpu.equal(pair, n), word, mine)
        both = [gpu.from_lane(mine, lane) for lane in (first, gpu.plus(first, 4))]
        words.append(gpu.pick_bytes(*both, 0x5410))
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
    row = gpu.plus(gpu.bits_of(lane, 7), gpu.shift_left(gpu.shift_right(lane, 4), 3))
    row = gpu.plus(row, gpu.shift_left(warp, 4))
    piece = gpu.flip_bits(gpu.bits_of(gpu.shift_right(lane, 3), 1), gpu.bits_of(lane, 7))
    start = gpu.plus(gpu.times(row, _ROW_BYTES), gpu.shift_left(piece, 4))
    new = []
    for i in range(4):
        matrices = gpu.load_transposed(gpu.advance(values, gpu.flip_bits(start, i << 5)))
        new += gpu.multiply_add_tiles(number, matrices, list(weights), list(sums[4 * i : 4 * i + 4]))
    return new


def leave_sums(where: Pointer, sums: Sequence[Value], weight: Value, lane: Value, *, codes: bool = False) -> None:
    """Stores the sums over a warp's positions, times a weight: 64 numbers; lanes q = 0 and 1 have the parts.

    Of every 16 these are numbers lane / 4 and lane / 4 + 8; of codes, which are summed in pairs, 2 (lane / 4) and the
    next.
    """
    pair, row = gpu.bits_of(lane, 3), gpu.shift_right(lane, 2)
    odd = gpu.equal(pair, 1)
    shifts = (3, 2) if codes else (2, 5)
    target = gpu.advance(where, gpu.plus(*(gpu.shift_left(*term) for term in zip((row, pair), shifts, strict=True))))
    for i in range(0, len(sums), 4):
        totals = [gpu.add(*sums[i : i + 2]), gpu.add(*sums[i + 2 : i + 4])]
        totals = [gpu.add(total, gpu.as_float(gpu.exchange(gpu.as_word(total), 1))) for total in totals]
        number = gpu.as_word(gpu.multiply(gpu.choose(odd, totals[1], totals[0]), weight))
        with gpu.when(gpu.less(pair, 2)):
            gpu.store(gpu.advance(target, 16 * i), [number])
