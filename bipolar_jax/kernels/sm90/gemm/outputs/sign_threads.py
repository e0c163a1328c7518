"""What the threads do with 64 rows of finished numbers that leave as signs.

In the accumulator's layout lane 4 r + q of warp i has rows 16 i + r and 16 i + r + 8 of the 64, and of every 8 columns
the pair 2 q, 2 q + 1. So of a word, 32 columns, it has four pairs, 8 bits; two exchanges among the four lanes of a row
make it whole, and one lane of the four stores it.
"""

from __future__ import annotations

import dataclasses
import functools

from bipolar_jax.kernels.sm90.arithmetic.operands import vector_length
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.packing.words import WORD_BITS

PAIRS = 4  # that a thread has of a word
# A row's summary: its largest magnitude, 15 bits that as integers are ordered as the numbers are, NaN above all; and
# below them the number of its ones.
COUNT_BITS = 17
NUMBERS = {"bfloat16": "bf16", "float16": "f16"}
_ONE = {"bf16": 0x3F803F80, "f16": 0x3C003C00}
_MAGNITUDES = 0x7FFF7FFF
_ALL = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class SignThreads:
    """Where the signs of a tile go.

    Attributes:
      dtype: "bfloat16" or "float16", of the finished numbers.
      m, n: rows and columns of all of them.
      tile_n: columns of a tile, whole words.
    """

    dtype: str
    m: int
    n: int
    tile_n: int

    @property
    def number(self) -> str:
        """As instructions call it."""
        return NUMBERS[self.dtype]

    @property
    def row_words(self) -> int:
        """Words of a row of the output: whole 16 bytes."""
        return -(-self.n // (4 * WORD_BITS)) * 4

    @property
    def tiles(self) -> int:
        """Of a row."""
        return -(-self.n // self.tile_n)

    @property
    def filled_rows(self) -> int:
        """Length of vectors over the rows, as `PackedTokens` has them."""
        return vector_length(self.m)

    @property
    def words(self) -> int:
        """Of a tile's row."""
        return self.tile_n // WORD_BITS

    @property
    def spare_words(self) -> int:
        """Words of a row beyond the last tile's, up to 3, which it clears; less than 0 if that tile has too many."""
        return self.row_words - self.tiles * self.words

    def leave(self, numbers: list[list[Value]], row: Value, column: Value, words, partials) -> None:
        """Stores the signs of 64 rows, and a summary of each; all threads take part.

        Args:
          numbers: of each of the thread's two rows, its pairs of columns in order, a word each.
          row, column: int32, where the 64 rows begin.
          words: uint32 [1, m, row_words] in global memory.
          partials: uint32 [tiles, filled_rows] likewise: summaries.
        """
        thread = ptx.opaque(ptx.thread_in_warpgroup())  # nothing made of it is kept through the products
        lane = ptx.bits_of(thread, 3)
        row = ptx.plus(row, ptx.times(ptx.shift_right(thread, 5), 16))
        row = ptx.plus(row, ptx.bits_of(ptx.shift_right(thread, 2), 7))
        valid = [self._valid(word, column) for word in range(self.words)]
        tile = ptx.divided(column, self.tile_n)
        summaries = ptx.advance_far(ptx.pointer(partials, ptx.GLOBAL), tile, 4 * self.filled_rows)
        # Clusters may have tiles beyond the last column.
        within = ptx.less(column, self.n)
        for half, pairs in enumerate(numbers):
            mine = ptx.plus(row, 8 * half)
            found, summary = self._row(pairs, lane, valid)
            stores = ptx.bits_of(within, ptx.less(mine, self.m))
            row_start = ptx.advance_far(ptx.pointer(words, ptx.GLOBAL), mine, 4 * self.row_words)
            self._store_words(found, row_start, column, lane, stores)
            with ptx.when(ptx.bits_of(stores, ptx.equal(lane, 0))):
                ptx.store(ptx.advance(summaries, ptx.times(mine, 4)), [summary])

    def _row(self, pairs: list[Value], lane: Value, valid: list[Value | None]) -> tuple[list[Value], Value]:
        """Words of one row, and its summary: in all lanes of it."""
        found, magnitudes, counts = [], [], []
        for word, mask in enumerate(valid):
            mine = pairs[PAIRS * word : PAIRS * (word + 1)]
            signs = self._signs(mine, lane)
            for distance in (1, 2):
                signs = ptx.either_bits(signs, ptx.exchange(signs, distance))
            found.append(ptx.flip_bits(signs, _ALL))
            if mask is not None:
                found[-1] = ptx.bits_of(found[-1], mask)
            counts.append(ptx.count_ones(found[-1]))
            magnitudes += [ptx.bits_of(pair, self._of_pair(mask, i, lane)) for i, pair in enumerate(mine)]
        largest = functools.reduce(functools.partial(ptx.extreme, "max", self.number), magnitudes)
        for distance in (1, 2):
            largest = ptx.extreme("max", self.number, largest, ptx.exchange(largest, distance))
        low, high = ptx.bits_of(largest, 0xFFFF), ptx.shift_right(largest, 16)
        largest = ptx.shift_left(ptx.choose(ptx.less(low, high), high, low), COUNT_BITS)
        return found, ptx.either_bits(largest, functools.reduce(ptx.plus, counts))

    def _signs(self, pairs: list[Value], lane: Value) -> Value:
        """Ones where this thread's numbers are below zero, at their places of a word."""
        # -0 + 0 is +0, and NaN has no sign.
        first, second, third, fourth = (
            ptx.fma_pairs(self.number, pair, ptx.int32(_ONE[self.number]), ptx.int32(0)) for pair in pairs
        )
        # Bytes with the signs: of the pairs' low numbers, then of the high ones.
        front, back = ptx.pick_bytes(first, second, 0x7351), ptx.pick_bytes(third, fourth, 0x7351)
        low, high = ptx.pick_bytes(front, back, 0x5410), ptx.pick_bytes(front, back, 0x7632)
        # A pair's bits at 6 and 7 of its byte, and then at 2 q and 2 q + 1.
        both = ptx.bits_of(ptx.choose_bits(0x80808080, high, ptx.shift_right(low, 1)), 0xC0C0C0C0)
        return ptx.shift_right(both, ptx.plus(ptx.times(lane, -2), 6))

    def _valid(self, word: int, column: Value) -> Value | None:
        """Bits of a tile's word that are below n; None if all of every tile are."""
        if self.n % self.tile_n == 0:
            return None
        left = ptx.plus(ptx.times(column, -1), self.n - WORD_BITS * word)
        mask = ptx.int32(_ALL)
        if not self._ends_with_a_word:
            beyond = ptx.plus(ptx.times(left, -1), WORD_BITS)
            beyond = ptx.choose(ptx.less(beyond, 0), ptx.int32(0), ptx.smaller(beyond, WORD_BITS - 1))
            mask = ptx.shift_right(mask, beyond)
        return ptx.choose(ptx.less(0, left), mask, ptx.int32(0))

    @property
    def _ends_with_a_word(self) -> bool:
        return self.n % WORD_BITS == 0

    def _of_pair(self, valid: Value | None, index: int, lane: Value) -> Value | int:
        """Mask of the magnitudes of a word's index-th pair, of columns below n."""
        if valid is None:
            return _MAGNITUDES
        if self._ends_with_a_word:
            return ptx.bits_of(valid, _MAGNITUDES)
        two = ptx.shift_right(ptx.shift_right(valid, ptx.shift_left(lane, 1)), 2 * PAIRS * index)
        low, high = ptx.bits_of(two, 1), ptx.bits_of(ptx.shift_right(two, 1), 1)
        return ptx.either_bits(ptx.times(low, 0x7FFF), ptx.times(high, 0x7FFF0000))

    def _store_words(self, found: list[Value], row_start: ptx.Pointer, column: Value, lane: Value, stores: Value):
        """Each lane of a row stores every fourth word."""
        first = ptx.divided(column, WORD_BITS)
        end = ptx.plus(ptx.times(first, -1), self.row_words)
        if self.spare_words <= 0:
            count, end = self.words, ptx.smaller(end, self.words)
        else:
            count = self.words + self.spare_words
            end = ptx.choose(ptx.less(ptx.plus(column, self.tile_n), self.n), ptx.int32(self.words), end)
            found = found + [ptx.int32(0)] * self.spare_words
        at = ptx.advance(row_start, ptx.times(ptx.plus(first, lane), 4))
        for start in range(0, count, 4):
            word, *others = found[start : start + 4]
            for i, other in enumerate(others):
                word = ptx.choose(ptx.equal(lane, i + 1), other, word)
            with ptx.when(ptx.bits_of(stores, ptx.less(ptx.plus(lane, start), end))):
                ptx.store(ptx.advance(at, 4 * start), [word])
