"""What each thread does with 64 rows of finished numbers whose signs are stored.

In the accumulator's layout lane 4 r + q of warp i has rows 16 i + r and 16 i + r + 8, and of every 8 columns the pair
2 q, 2 q + 1. So of a word, 32 columns, it has four pairs: 8 bits. Two exchanges between the four lanes of a row make
the word whole, and one of the four lanes stores it.
"""

from __future__ import annotations

import dataclasses
import functools

from bipolar_jax.kernels.sm90.arithmetic import operands
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.packing.words import WORD_BITS

# The summary of a row: its largest magnitude, whose 15 bits order as the numbers do, with NaN above all; and below
# them, in COUNT_BITS bits, the number of its ones.
COUNT_BITS = 17
DTYPES = ("bfloat16", "float16")

_PAIRS_PER_WORD = 4  # of one thread
_ONES = {"bf16": 0x3F803F80, "f16": 0x3C003C00}  # the number 1, twice
_MAGNITUDES = 0x7FFF7FFF
_ALL_BITS = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class SignPacking:
    """Where the signs of a tile go.

    Attributes:
      dtype: of the finished numbers, one of DTYPES.
      m, n: rows and columns of the output.
      tile_n: columns of a tile, whole words.
    """

    dtype: str
    m: int
    n: int
    tile_n: int

    @property
    def number(self) -> str:
        """The dtype in PTX."""
        return PTX_TYPES[self.dtype]

    @property
    def row_words(self) -> int:
        """Words in a row of the output: whole 16 bytes."""
        return -(-self.n // (4 * WORD_BITS)) * 4

    @property
    def tiles(self) -> int:
        """Tiles in a row."""
        return -(-self.n // self.tile_n)

    @property
    def vector_length(self) -> int:
        """Length of vectors over the rows, as `PackedTokens` has them."""
        return operands.vector_length(self.m)

    @property
    def tile_words(self) -> int:
        """Words in a row of a tile."""
        return self.tile_n // WORD_BITS

    @property
    def spare_words(self) -> int:
        """Words in a row beyond the last tile, up to 3, which that tile clears; negative if the tile has too many."""
        return self.row_words - self.tiles * self.tile_words

    def store(self, pairs: list[list[Value]], row: Value, column: Value, signs: Value, summaries: Value) -> None:
        """Stores the signs of 64 rows, and a summary of each; all threads of the warpgroup take part.

        Args:
          pairs: of each of the thread's two rows, its pairs of columns in order, a word each.
          row, column: int32, where the 64 rows begin.
          signs: uint32 [1, m, row_words] in global memory.
          summaries: uint32 [tiles, vector_length] likewise.
        """
        # Opaque: otherwise values made of it are kept in registers through the products.
        thread = ptx.opaque(ptx.thread_in_warpgroup())
        lane = ptx.bits_of(thread, 3)  # among the four of a row
        row = ptx.plus(row, ptx.times(ptx.shift_right(thread, 5), 16))
        row = ptx.plus(row, ptx.bits_of(ptx.shift_right(thread, 2), 7))
        column_masks = [self._column_mask(word, column) for word in range(self.tile_words)]
        tile = ptx.divided(column, self.tile_n)
        tile_summaries = ptx.advance_far(ptx.pointer(summaries, ptx.GLOBAL), tile, 4 * self.vector_length)
        # Clusters may have tiles beyond the last column.
        is_tile = ptx.less(column, self.n)
        for half, row_pairs in enumerate(pairs):
            my_row = ptx.plus(row, 8 * half)
            words, summary = self._pack_row(row_pairs, lane, column_masks)
            is_row = ptx.bits_of(is_tile, ptx.less(my_row, self.m))
            row_start = ptx.advance_far(ptx.pointer(signs, ptx.GLOBAL), my_row, 4 * self.row_words)
            self._store_words(words, row_start, column, lane, is_row)
            with ptx.when(ptx.bits_of(is_row, ptx.equal(lane, 0))):
                ptx.store(ptx.advance(tile_summaries, ptx.times(my_row, 4)), [summary])

    def _pack_row(self, pairs: list[Value], lane: Value, column_masks: list[Value | None]) -> tuple[list[Value], Value]:
        """The words of one row, and its summary; all four lanes of the row get both."""
        words, magnitudes, counts = [], [], []
        for i, mask in enumerate(column_masks):
            word_pairs = pairs[_PAIRS_PER_WORD * i : _PAIRS_PER_WORD * (i + 1)]
            negative = self._negative(word_pairs, lane)
            for distance in (1, 2):
                negative = ptx.either_bits(negative, ptx.exchange(negative, distance))
            words.append(ptx.flip_bits(negative, _ALL_BITS))
            if mask is not None:
                words[-1] = ptx.bits_of(words[-1], mask)
            counts.append(ptx.count_ones(words[-1]))
            magnitudes += [ptx.bits_of(pair, self._magnitude_mask(mask, j, lane)) for j, pair in enumerate(word_pairs)]
        largest = functools.reduce(functools.partial(ptx.extreme, "max", self.number), magnitudes)
        for distance in (1, 2):
            largest = ptx.extreme("max", self.number, largest, ptx.exchange(largest, distance))
        low, high = ptx.bits_of(largest, 0xFFFF), ptx.shift_right(largest, 16)
        largest = ptx.shift_left(ptx.choose(ptx.less(low, high), high, low), COUNT_BITS)
        return words, ptx.either_bits(largest, functools.reduce(ptx.plus, counts))

    def _negative(self, pairs: list[Value], lane: Value) -> Value:
        """A word with ones where this thread's numbers are below zero, in their columns' bits."""
        # x * 1 + 0: -0 becomes +0, and NaN becomes the canonical NaN, whose sign bit is 0.
        first, second, third, fourth = (
            ptx.fma_pairs(self.number, pair, ptx.int32(_ONES[self.number]), ptx.int32(0)) for pair in pairs
        )
        # The bytes that hold the signs: of the pairs' low numbers, then of their high numbers.
        front, back = ptx.pick_bytes(first, second, 0x7351), ptx.pick_bytes(third, fourth, 0x7351)
        low, high = ptx.pick_bytes(front, back, 0x5410), ptx.pick_bytes(front, back, 0x7632)
        # A pair's signs become bits 6 and 7 of its byte, and then bits 2 q and 2 q + 1.
        signs = ptx.bits_of(ptx.choose_bits(0x80808080, high, ptx.shift_right(low, 1)), 0xC0C0C0C0)
        return ptx.shift_right(signs, ptx.plus(ptx.times(lane, -2), 6))

    def _column_mask(self, word: int, column: Value) -> Value | None:
        """Ones in the bits of a tile's word that are columns below n; None if those of every tile are."""
        if self.n % self.tile_n == 0:
            return None
        columns_left = ptx.plus(ptx.times(column, -1), self.n - WORD_BITS * word)
        mask = ptx.int32(_ALL_BITS)
        if not self._ends_with_a_word:
            beyond = ptx.plus(ptx.times(columns_left, -1), WORD_BITS)
            beyond = ptx.choose(ptx.less(beyond, 0), ptx.int32(0), ptx.smaller(beyond, WORD_BITS - 1))
            mask = ptx.shift_right(mask, beyond)
        return ptx.choose(ptx.less(0, columns_left), mask, ptx.int32(0))

    @property
    def _ends_with_a_word(self) -> bool:
        return self.n % WORD_BITS == 0

    def _magnitude_mask(self, column_mask: Value | None, pair: int, lane: Value) -> Value | int:
        """Ones in the magnitudes of one of a word's pairs, where they are columns below n."""
        if column_mask is None:
            return _MAGNITUDES
        if self._ends_with_a_word:
            return ptx.bits_of(column_mask, _MAGNITUDES)
        own_columns = ptx.shift_right(column_mask, ptx.shift_left(lane, 1))
        own_columns = ptx.shift_right(own_columns, 2 * _PAIRS_PER_WORD * pair)
        low, high = ptx.bits_of(own_columns, 1), ptx.bits_of(ptx.shift_right(own_columns, 1), 1)
        return ptx.either_bits(ptx.times(low, 0x7FFF), ptx.times(high, 0x7FFF0000))

    def _store_words(self, words: list[Value], row_start: Pointer, column: Value, lane: Value, is_row: Value) -> None:
        """Stores a row's words in this tile; each of its four lanes stores every fourth."""
        first = ptx.divided(column, WORD_BITS)
        end = ptx.plus(ptx.times(first, -1), self.row_words)
        if self.spare_words <= 0:
            count, end = self.tile_words, ptx.smaller(end, self.tile_words)
        else:
            count = self.tile_words + self.spare_words
            end = ptx.choose(ptx.less(ptx.plus(column, self.tile_n), self.n), ptx.int32(self.tile_words), end)
            words = words + [ptx.int32(0)] * self.spare_words
        first_ptr = ptx.advance(row_start, ptx.times(ptx.plus(first, lane), 4))
        for start in range(0, count, 4):
            word, *others = words[start : start + 4]
            for i, other in enumerate(others):
                word = ptx.choose(ptx.equal(lane, i + 1), other, word)
            with ptx.when(ptx.bits_of(is_row, ptx.less(ptx.plus(lane, start), end))):
                ptx.store(ptx.advance(first_ptr, 4 * start), [word])
