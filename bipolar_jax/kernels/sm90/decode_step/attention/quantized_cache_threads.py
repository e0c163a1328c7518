"""What a thread does for the attention of one query to codes of 8 or 4 bits, in the functions of `instructions` alone.

As `attention_threads` has it of 16-bit floats, with codes made such floats on their way to the tensor core: signed
ones, code - 2^(bits - 1), which bfloat16 holds exactly. Scales and zeros are the rows' own, and no matter here. What is
summed over may be in any order, so that a byte goes where taking it apart is cheapest: bytes 0 and 2 of a word make one
pair of numbers, bytes 1 and 3 another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_step.attention import float_cache_threads

NUMBER = "bf16"
_PIECE = 16  # bytes that the swizzle exchanges
_ONES = 0x3F803F80  # two bfloat16


def row_bytes(bits: int) -> int:
    """Of a vector of 128 codes in shared memory: as wide as the swizzle."""
    return 16 * bits


def pairs(bits: int, word: Value) -> list[Value]:
    """The signed codes of a word as pairs: of bytes 0 and 2, of 1 and 3; of 4 bits those of the upper halves last."""
    if bits == 8:
        return [_signed_bytes(word), _signed_bytes(ptx.shift_right(word, 8))]
    # 0x4300 is 128, and has units in the last place: 128 + code, less 128 + 8.
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
    """Of bytes 0 and 2: 128 + the lower seven bits, less 128 where the highest one is set, else 256."""
    lower = ptx.masked_or(word, 0x007F007F, 0x43004300)
    less = ptx.flip_bits(ptx.bits_of(word, 0x00800080), 0xC380C380)
    return ptx.fma_pairs(NUMBER, lower, ptx.int32(_ONES), less)


def scores(bits: int, keys: Pointer, query: Sequence[Value], lane: Value, warp: Value) -> tuple[Value, Value]:
    """Products of the keys' signed codes of rows lane / 4 and lane / 4 + 8 with the query, in all four lanes of a row.

    Args:
      bits: 8 or 4.
      keys: shared memory, 64 positions, in the swizzle of their width.
      query: of `load_query`, stored for codes.
      lane, warp: of the warpgroup.
    """
    width, row = row_bytes(bits), ptx.shift_right(lane, 2)
    start = ptx.plus(_start(bits, row, warp), ptx.shift_left(ptx.bits_of(lane, 3), 2))

    def tiles() -> Iterator[tuple[int, list[Value]]]:
        """Each made just before it is multiplied: all at a time would take too many registers."""
        for piece in range(width // _PIECE):
            where = ptx.advance(keys, ptx.flip_bits(start, piece * _PIECE))
            both = [pairs(bits, ptx.load(ptx.advance(where, below * width), 1)[0]) for below in (0, 8)]
            for half in range(8 // bits):  # the upper halves of bytes are the second half of the vector
                yield 8 * half + 2 * piece, [of_row[2 * half + i] for i in range(2) for of_row in both]

    return float_cache_threads.scores_of_tiles(NUMBER, tiles(), query)


def query_sum(query: Sequence[Value]) -> Value:
    """The sum of a query's numbers, as `scores` adds them up."""
    ones = (ptx.int32(_ONES),) * 2
    return float_cache_threads.scores(NUMBER, [ones] * len(query), query)[0]


def add_values(
    bits: int, values: Pointer, weights: Sequence[Value], lane: Value, warp: Value, sums: Sequence[Value]
) -> list[Value]:
    """Adds weights . signed codes of a warp's 16 positions and 128 numbers, in the columns of the weights.

    Args:
      bits: 8 or 4.
      values: shared memory, 64 positions, in the swizzle of their width.
      weights: of `spread_weights`.
      lane, warp: of the warpgroup.
      sums: for every 16 numbers, 4 of them: columns 2 q and 2 q + 1 of numbers 2 (lane / 4) and the next.
    """
    # Matrices of 8 positions and 8 pairs of bytes, a piece: lower and upper positions, then again of the next piece.
    row = ptx.plus(ptx.bits_of(lane, 7), ptx.bits_of(lane, 8))
    start = ptx.flip_bits(_start(bits, row, warp), ptx.bits_of(lane, 16))
    new = list(sums)
    for piece in range(0, row_bytes(bits) // _PIECE, 2):
        matrices = ptx.load_transposed(ptx.advance(values, ptx.flip_bits(start, piece * _PIECE)))
        for i in range(2):
            both = [pairs(bits, word) for word in matrices[2 * i : 2 * i + 2]]
            for half in range(8 // bits):
                tile = [pair for of_positions in both for pair in of_positions[2 * half : 2 * half + 2]]
                at = 4 * (4 * half + piece + i)
                new[at : at + 4] = ptx.multiply_add_tiles(NUMBER, tile, list(weights), new[at : at + 4])
    return new


def _start(bits: int, row: Value, warp: Value) -> Value:
    """Where a row of a warp begins: the offset of its first piece, whose bits select others by `flip_bits`.

    The swizzle exchanges pieces by the number of the row among 8 where rows have 128 bytes, by half of it where they
    have 64.
    """
    exchanged = ptx.bits_of(row, 7) if bits == 8 else ptx.bits_of(ptx.shift_right(row, 1), 3)
    row = ptx.plus(row, ptx.shift_left(warp, 4))
    return ptx.plus(ptx.times(row, row_bytes(bits)), ptx.shift_left(exchanged, 4))
