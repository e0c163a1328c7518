"""What the threads do that round and pack the columns of a matrix.

A thread takes 128 numbers of a column, a run, and keeps in registers all words that become of them, four in a row of
every plane. Lanes of a warp take 16 columns and two runs that follow each other, so that all accesses are of whole
sectors of 32 bytes: two lanes write eight words in a row, 16 or more load what is side by side in a row of the matrix.

Sums of the codes leave as they are in registers, of a run or of what of it shares a group; to add up those of a column
is little work for who reads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.bit_transpose import CodeWords, byte_order_of, gather_words, transpose_to_planes
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK
from bipolar_jax.packing.words import num_words

_RUN_WORDS = 4  # of a plane: what one store writes
_RUN = _RUN_WORDS * BLOCK
_RUNS = 2  # of each column, for a block of threads
_WARP_COLUMNS = 16
COLUMNS, ROWS = WARPGROUP // _RUNS, _RUNS * _RUN  # of the matrix, for a block of threads


@dataclasses.dataclass(frozen=True)
class ColumnPacking:
    """How a matrix is shared out to blocks of threads.

    Attributes:
      number: "bf16", "f16" or "f32", of w.
      number_format: of the codes.
      k, n: rows and columns of w.
      group_size: None, or a multiple of 32.
      with_offset: whether there is one.
    """

    number: str
    number_format: BipolarFormat
    k: int
    n: int
    group_size: int | None
    with_offset: bool

    @property
    def words(self) -> int:
        """Of a column of a plane."""
        return num_words(self.k)

    @property
    def part_size(self) -> int:
        """Numbers that a sum of codes is of."""
        return _RUN if self.group_size is None else math.gcd(self.group_size, _RUN)

    @property
    def parts(self) -> int:
        """Sums of a column."""
        return -(-self.k // self.part_size)

    @property
    def row_blocks(self) -> int:
        return -(-self.k // ROWS)

    @property
    def blocks(self) -> int:
        """Of threads; those of the same columns follow each other, as their words do."""
        return -(-self.n // COLUMNS) * self.row_blocks

    def pack_block(self, block: Value, w: Value, half_steps: Value, *rest: Value) -> None:
        """What a block's threads do.

        Args:
          block: its index, int32.
          w: [k, n] in global memory.
          half_steps: float32 [groups, n], likewise.
          *rest: offsets, likewise, if there are any; the planes uint32 [bits, n, words]; the sums int32 [parts, n].
        """
        *offset, planes, sums = rest
        thread = ptx.thread_in_warpgroup()
        column_block = ptx.divided(block, self.row_blocks)
        row_block = ptx.plus(block, ptx.times(column_block, -self.row_blocks))
        # Bits 0 to 3 of a thread's index count columns, as do those of its warp; bit 4 is the run.
        in_block = ptx.plus(
            ptx.bits_of(thread, _WARP_COLUMNS - 1), ptx.times(ptx.shift_right(thread, 5), _WARP_COLUMNS)
        )
        column = ptx.plus(ptx.times(column_block, COLUMNS), in_block)
        run = ptx.plus(ptx.times(row_block, _RUNS), ptx.bits_of(ptx.shift_right(thread, 4), 1))
        with contextlib.ExitStack() as inside:
            for index, count, multiple in ((column, self.n, COLUMNS), (run, -(-self.k // _RUN), _RUNS)):
                if count % multiple:
                    inside.enter_context(ptx.when(ptx.less(index, count)))
            self._pack_run(run, column, w, [half_steps, *offset], planes, sums)

    def _pack_run(self, run: Value, column: Value, w: Value, by_column: list[Value], planes: Value, sums: Value):
        """Packs the run of a column; both exist."""
        first = ptx.times(run, _RUN)
        # The words of every plane, one after the other.
        words, counts = [], []
        for i in range(_RUN_WORDS):
            row = ptx.plus(first, i * BLOCK)
            factors = [self._load_factor(array, row, column) for array in by_column]
            block = self._planes_of(self._load(w, row, column), *factors)
            if self.k % _RUN:
                block = [self._up_to_k(word, row) for word in block]
            words.append(block)
            counts.append(self._sum_of(block))
        start = ptx.advance_far(ptx.pointer(planes, ptx.GLOBAL), column, 4 * self.words)
        start = ptx.advance(start, ptx.times(run, 4 * _RUN_WORDS))
        for plane, row_words in enumerate(zip(*words, strict=True)):
            self._store_words(ptx.advance_far(start, plane, 4 * self.n * self.words), run, list(row_words))
        of_part = self.part_size // BLOCK
        start = ptx.pointer(sums, ptx.GLOBAL)
        for i in range(0, _RUN_WORDS, of_part):
            part = ptx.plus(ptx.times(run, _RUN_WORDS // of_part), i // of_part)
            total = functools.reduce(ptx.plus, counts[i : i + of_part])
            with self._where(part, self.parts, _RUN_WORDS // of_part):
                ptx.store(ptx.advance(ptx.advance_far(start, part, 4 * self.n), ptx.times(column, 4)), [total])

    def _load_factor(self, array: Value, row: Value, column: Value) -> Value:
        """The number that the row's group has for the column."""
        start = ptx.advance(ptx.pointer(array, ptx.GLOBAL), ptx.times(column, 4))
        if self.group_size is not None:
            group = ptx.divided(self._existing(row), self.group_size)
            start = ptx.advance_far(start, group, 4 * self.n)
        return ptx.as_float(ptx.load(start, 1)[0])

    def _load(self, w: Value, row: Value, column: Value) -> list[Value]:
        """32 numbers of a column from a row on, or its last ones where there are fewer."""
        size = 4 if self.number == "f32" else 2
        start = ptx.advance_far(ptx.pointer(w, ptx.GLOBAL), self._window(row), size * self.n)
        start = ptx.advance(start, ptx.times(column, size))
        places = [ptx.advance_far(start, i, size * self.n) for i in range(BLOCK)]
        words = [ptx.load(at, 1)[0] if size == 4 else ptx.load_half(at) for at in places]
        return [ptx.expand(self.number, word)[0] for word in words]

    def _planes_of(self, numbers: list[Value], half_steps: Value, offset: Value | None = None) -> list[Value]:
        """A word of every plane, of 32 numbers."""
        fmt = self.number_format
        # Halves of a ternary number's steps are the codes of two bits: 0, 1 or 2 for what is below -0.5, between, and
        # from 0.5 on.
        rounded_to = BipolarFormat(2) if fmt.ternary else fmt
        codes, middle = CodeWords(rounded_to, signed=False), rounded_to.code_offset
        if fmt.ternary:
            half_steps = ptx.add(half_steps, half_steps)
        bases = {place: ptx.float32(codes.rounding_base(place) + middle) for place in codes.places}

        def encode(x: Value, place: int) -> Value:
            if offset is not None:
                x = ptx.subtract(x, offset)
            # To be rounded down comes after, which changes nothing at integers; NaN has the code 0.
            steps = ptx.at_least(ptx.multiply(x, half_steps), float(-middle))
            steps = ptx.at_most(steps, float(rounded_to.max_value - middle))
            return ptx.as_word(ptx.add_down(steps, bases[place]))

        rounded = [[encode(x, codes.place(i)) for i, x in enumerate(numbers[e : e + 8])] for e in range(0, BLOCK, 8)]
        planes = transpose_to_planes(gather_words(codes, rounded, byte_order_of(ptx.int32(0))))
        if fmt.ternary:
            return [ptx.either_bits(*planes), ptx.bits_of(*planes)]
        return planes[: fmt.bits]

    def _sum_of(self, planes: list[Value]) -> Value:
        """Of the codes of a block."""
        weights = self.number_format.plane_weights
        counts = [
            ptx.shift_left(ptx.count_ones(word), weight.bit_length() - 1)
            for weight, word in zip(weights, planes, strict=True)
        ]
        return functools.reduce(ptx.plus, counts)

    def _store_words(self, start: Pointer, run: Value, words: list[Value]) -> None:
        """Writes those of the run's words that exist."""
        if self.words % _RUN_WORDS == 0:
            ptx.store(start, words)
            return
        for i, word in enumerate(words):
            with self._where(ptx.plus(ptx.times(run, _RUN_WORDS), i), self.words, _RUN_WORDS):
                ptx.store(ptx.advance(start, 4 * i), [word])

    def _where(self, index: Value, count: int, multiple: int) -> contextlib.AbstractContextManager:
        """Where an index that comes in multiples is below the count."""
        return ptx.when(ptx.less(index, count)) if count % multiple else contextlib.nullcontext()

    # Of the block that has the last row, and of those after it, the last 32 rows are loaded, and shifted: no load
    # needs a condition.

    def _existing(self, row: Value) -> Value:
        """The row, or the last one."""
        return ptx.smaller(row, self.k - 1) if self.k % _RUN else row

    def _window(self, row: Value) -> Value:
        """The row from which on there are 32."""
        return ptx.smaller(row, self.k - BLOCK) if self.k % _RUN else row

    def _up_to_k(self, word: Value, row: Value) -> Value:
        """The word that begins with the row, of what the window has; zeros beyond k."""
        missing = ptx.plus(row, ptx.times(self._window(row), -1))
        shifted = ptx.shift_right(word, ptx.smaller(missing, BLOCK - 1))
        return ptx.choose(ptx.less(missing, BLOCK), shifted, ptx.int32(0))
