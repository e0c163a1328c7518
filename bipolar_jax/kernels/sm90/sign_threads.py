"""What the threads do with 64 rows of finished numbers that leave as signs.

In the accumulator's layout lane 4 r + q of warp i has rows 16 i + r and 16 i + r + 8 of the 64, and of every 8 columns
the pair 2 q, 2 q + 1. So of a word, 32 columns, it has four pairs, 8 bits; two exchanges among the four lanes of a row
make it whole, and one lane of the four stores it.
"""

from __future__ import annotations

import dataclasses
import functools

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.instructions import Value
from bipolar_jax.kernels.sm90.operand_words import vector_length
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
        thread = gpu.opaque(gpu.thread_in_warpgroup())  # nothing made of it is kept through the products
        lane = gpu.bits_of(thread, 3)
        row = gpu.plus(row, gpu.times(gpu.shift_right(thread, 5), 16))
        row = gpu.plus(row, gpu.bits_of(gpu.shift_right(thread, 2), 7))
        valid = [self._valid(word, column) for word in range(self.words)]
        tile = gpu.divided(column, self.tile_n)
        summaries = gpu.advance_far(gpu.pointer(partials, gpu.GLOBAL), tile, 4 * self.filled_rows)
        # Clusters may have tiles beyond the last column.
        within = gpu.less(column, self.n)
        for half, pairs in enumerate(numbers):
            mine = gpu.plus(row, 8 * half)
            found, summary = self._row(pairs, lane, valid)
            stores = gpu.bits_of(within, gpu.less(mine, self.m))
            row_start = gpu.advance_far(gpu.pointer(words, gpu.GLOBAL), mine, 4 * self.row_words)
            self._store_words(found, row_start, column, lane, stores)
            with gpu.when(gpu.bits_of(stores, gpu.equal(lane, 0))):
                gpu.store(gpu.advance(summaries, gpu.times(mine, 4)), [summary])

    def _row(self, pairs: list[Value], lane: Value, valid: list[Value | None]) -> tuple[list[Value], Value]:
        """Words of one row, and its summary: in all lanes of it."""
        found, magnitudes, counts = [], [], []
        for word, mask in enumerate(valid):
            mine = pairs[PAIRS * word : PAIRS * (word + 1)]
            signs = self._signs(mine, lane)
            for distance in (1, 2):
                signs = gpu.either_bits(signs, gpu.exchange(signs, distance))
            found.append(gpu.flip_bits(signs, _ALL))
            if mask is not None:
                found[-1] = gpu.bits_of(found[-1], mask)
            counts.append(gpu.count_ones(found[-1]))
            magnitudes += [gpu.bits_of(pair, self._of_pair(mask, i, lane)) for i, pair in enumerate(mine)]
        largest = functools.reduce(functools.partial(gpu.extreme, "max", self.number), magnitudes)
        for distance in (1, 2):
            largest = gpu.extreme("max", self.number, largest, gpu.exchange(largest, distance))
        low, high = gpu.bits_of(largest, 0xFFFF), gpu.shift_right(largest, 16)
        largest = gpu.shift_left(gpu.choose(gpu.less(low, high), high, low), COUNT_BITS)
        return found, gpu.either_bits(largest, functools.reduce(gpu.plus, counts))

    def _signs(self, pairs: list[Value], lane: Value) -> Value:
        """Ones where this thread's numbers are below zero, at their places of a word."""
        # -0 + 0 is +0, and NaN has no sign.
        first, second, third, fourth = (
            gpu.fma_pairs(self.number, pair, gpu.int32(_ONE[self.number]), gpu.int32(0)) for pair in pairs
        )
        # Bytes with the signs: of the pairs' low numbers, then of the high ones.
        front, back = gpu.pick_bytes(first, second, 0x7351), gpu.pick_bytes(third, fourth, 0x7351)
        low, high = gpu.pick_bytes(front, back, 0x5410), gpu.pick_bytes(front, back, 0x7632)
        # A pair's bits at 6 and 7 of its byte, and then at 2 q and 2 q + 1.
        both = gpu.bits_of(gpu.choose_bits(0x80808080, high, gpu.shift_right(low, 1)), 0xC0C0C0C0)
        return gpu.shift_right(both, gpu.plus(gpu.times(lane, -2), 6))

    def _valid(self, word: int, column: Value) -> Value | None:
        """Bits of a tile's word that are below n; None if all of every tile are."""
        if self.n % self.tile_n == 0:
            return None
        left = gpu.plus(gpu.times(column, -1), self.n - WORD_BITS * word)
        mask = gpu.int32(_ALL)
        if not self._ends_with_a_word:
            beyond = gpu.plus(gpu.times(left, -1), WORD_BITS)
            beyond = gpu.choose(gpu.less(beyond, 0), gpu.int32(0), gpu.smaller(beyond, WORD_BITS - 1))
            mask = gpu.shift_right(mask, beyond)
        return gpu.choose(gpu.less(0, left), mask, gpu.int32(0))

    @property
    def _ends_with_a_word(self) -> bool:
        return self.n % WORD_BITS == 0

    def _of_pair(self, valid: Value | None, index: int, lane: Value) -> Value | int:
        """Mask of the magnitudes of a word's index-th pair, of columns below n."""
        if valid is None:
            return _MAGNITUDES
        if self._ends_with_a_word:
            return gpu.bits_of(valid, _MAGNITUDES)
        two = gpu.shift_right(gpu.shift_right(valid, gpu.shift_left(lane, 1)), 2 * PAIRS * index)
        low, high = gpu.bits_of(two, 1), gpu.bits_of(gpu.shift_right(two, 1), 1)
        return gpu.either_bits(gpu.times(low, 0x7FFF), gpu.times(high, 0x7FFF0000))

    def _store_words(self, found: list[Value], row_start: gpu.Pointer, column: Value, lane: Value, stores: Value):
        """Each lane of a row stores every fourth word."""
        first = gpu.divided(column, WORD_BITS)
        end = gpu.plus(gpu.times(first, -1), self.row_words)
        if self.spare_words <= 0:
            count, end = self.words, gpu.smaller(end, self.words)
        else:
            count = self.words + self.spare_words
            end = gpu.choose(gpu.less(gpu.plus(column, self.tile_n), self.n), gpu.int32(self.words), end)
            found = found + [gpu.int32(0)] * self.spare_words
        at = gpu.advance(row_start, gpu.times(gpu.plus(first, lane), 4))
        for start in range(0, count, 4):
            word, *others = found[start : start + 4]
            for i, other in enumerate(others):
                word = gpu.choose(gpu.equal(lane, i + 1), other, word)
            with gpu.when(gpu.bits_of(stores, gpu.less(gpu.plus(lane, start), end))):
                gpu.store(gpu.advance(at, 4 * start), [word])
