"""What the threads do that round and pack the columns of a matrix.

A thread takes a run, 128 consecutive numbers of a column, and keeps all its words in registers: four consecutive words
of every plane. The lanes of a warp take 16 columns and two consecutive runs, so that every access covers whole sectors
of 32 bytes: two lanes store eight consecutive words, 16 or more load neighbouring numbers of a row of the matrix.

Sums of codes leave from registers, one for every run or for the numbers of a run that share a group; the caller adds
them up, which is little work.
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

_RUN_WORDS = 4  # words of a plane that one store writes
_RUN = _RUN_WORDS * BLOCK  # numbers of a column that one thread packs
_RUNS = 2  # runs of each column in a block of threads
_WARP_COLUMNS = 16
COLUMNS, ROWS = WARPGROUP // _RUNS, _RUNS * _RUN  # part of the matrix that a block of threads packs


@dataclasses.dataclass(frozen=True)
class ColumnPacking:
    """How a matrix is divided among blocks of threads.

    Attributes:
      ptx_type: of w, "bf16", "f16" or "f32".
      number_format: format of the codes.
      k, n: rows and columns of w.
      group_size: None, or a multiple of 32.
      with_offset: whether groups have offsets.
    """

    ptx_type: str
    number_format: BipolarFormat
    k: int
    n: int
    group_size: int | None
    with_offset: bool

    @property
    def words(self) -> int:
        """Words of a column of a plane."""
        return num_words(self.k)

    @property
    def sum_length(self) -> int:
        """How many numbers each sum of codes covers."""
        return _RUN if self.group_size is None else math.gcd(self.group_size, _RUN)

    @property
    def num_sums(self) -> int:
        """Sums of codes of a column."""
        return -(-self.k // self.sum_length)

    @property
    def row_blocks(self) -> int:
        return -(-self.k // ROWS)

    @property
    def blocks(self) -> int:
        """Blocks of threads; consecutive ones have the same columns, as consecutive words do."""
        return -(-self.n // COLUMNS) * self.row_blocks

    def pack_block(self, block: Value, w: Value, half_steps: Value, *rest: Value) -> None:
        """Packs a block's part of the matrix.

        Args:
          block: index of the block, int32.
          w: [k, n] in global memory.
          half_steps: float32 [groups, n], likewise.
          *rest: offsets, likewise, if any; the outputs: planes uint32 [bits, n, words], sums int32 [num_sums, n].
        """
        *offset, planes, sums = rest
        thread = ptx.thread_in_warpgroup()
        column_block = ptx.divided(block, self.row_blocks)
        row_block = ptx.plus(block, ptx.times(column_block, -self.row_blocks))
        # Bits 0 to 3 of a thread's index, and its warp, select the column; bit 4 selects the run.
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

    def _pack_run(self, run: Value, column: Value, w: Value, column_terms: list[Value], planes: Value, sums: Value):
        """Packs a run of a column; both are within the matrix."""
        first = ptx.times(run, _RUN)
        words, code_sums = [], []
        for i in range(_RUN_WORDS):
            row = ptx.plus(first, i * BLOCK)
            factors = [self._load_factor(array, row, column) for array in column_terms]
            block = self._planes_of(self._load(w, row, column), *factors)
            if self.k % _RUN:
                block = [self._up_to_k(word, row) for word in block]
            words.append(block)
            code_sums.append(self._sum_of(block))
        start = ptx.advance_far(ptx.pointer(planes, ptx.GLOBAL), column, 4 * self.words)
        start = ptx.advance(start, ptx.times(run, 4 * _RUN_WORDS))
        for plane, row_words in enumerate(zip(*words, strict=True)):
            self._store_words(ptx.advance_far(start, plane, 4 * self.n * self.words), run, list(row_words))
        sum_blocks = self.sum_length // BLOCK
        start = ptx.pointer(sums, ptx.GLOBAL)
        for i in range(0, _RUN_WORDS, sum_blocks):
            index = ptx.plus(ptx.times(run, _RUN_WORDS // sum_blocks), i // sum_blocks)
            total = functools.reduce(ptx.plus, code_sums[i : i + sum_blocks])
            with self._where(index, self.num_sums, _RUN_WORDS // sum_blocks):
                ptx.store(ptx.advance(ptx.advance_far(start, index, 4 * self.n), ptx.times(column, 4)), [total])

    def _load_factor(self, array: Value, row: Value, column: Value) -> Value:
        """The column's element of [groups, n], of the group that the row belongs to."""
        start = ptx.advance(ptx.pointer(array, ptx.GLOBAL), ptx.times(column, 4))
        if self.group_size is not None:
            group = ptx.divided(self._existing(row), self.group_size)
            start = ptx.advance_far(start, group, 4 * self.n)
        return ptx.as_float(ptx.load(start, 1)[0])

    def _load(self, w: Value, row: Value, column: Value) -> list[Value]:
        """32 numbers of a column from `row` on, or the last 32 of the column."""
        size = 4 if self.ptx_type == "f32" else 2
        start = ptx.advance_far(ptx.pointer(w, ptx.GLOBAL), self._window(row), size * self.n)
        start = ptx.advance(start, ptx.times(column, size))
        pointers = [ptx.advance_far(start, i, size * self.n) for i in range(BLOCK)]
        words = [ptx.load(at, 1)[0] if size == 4 else ptx.load_half(at) for at in pointers]
        return [ptx.expand(self.ptx_type, word)[0] for word in words]

    def _planes_of(self, numbers: list[Value], half_steps: Value, offset: Value | None = None) -> list[Value]:
        """One word of every plane, from 32 numbers."""
        fmt = self.number_format
        # Ternary numbers are compared with -0.5 and 0.5 steps by rounding doubled steps to codes of two bits: 0 below,
        # 1 or 2 between, 3 above. OR and AND of the planes of these codes are the ternary planes.
        rounded_to = BipolarFormat(2) if fmt.ternary else fmt
        codes, middle = CodeWords(rounded_to, signed=False), rounded_to.code_offset
        if fmt.ternary:
            half_steps = ptx.add(half_steps, half_steps)
        bases = {start: ptx.float32(codes.rounding_base(start) + middle) for start in codes.field_starts}

        def encode(x: Value, field_start: int) -> Value:
            if offset is not None:
                x = ptx.subtract(x, offset)
            # Clipped before rounding down: the limits are integers, so the order does not matter. NaN becomes code 0.
            steps = ptx.at_least(ptx.multiply(x, half_steps), float(-middle))
            steps = ptx.at_most(steps, float(rounded_to.max_value - middle))
            return ptx.as_word(ptx.add_down(steps, bases[field_start]))

        rounded = [
            [encode(x, codes.field_start(i)) for i, x in enumerate(numbers[e : e + 8])] for e in range(0, BLOCK, 8)
        ]
        planes = transpose_to_planes(gather_words(codes, rounded, byte_order_of(ptx.int32(0))))
        if fmt.ternary:
            return [ptx.either_bits(*planes), ptx.bits_of(*planes)]
        return planes[: fmt.bits]

    def _sum_of(self, planes: list[Value]) -> Value:
        """The sum of the codes of a block."""
        weights = self.number_format.plane_weights
        counts = [
            ptx.shift_left(ptx.count_ones(word), weight.bit_length() - 1)
            for weight, word in zip(weights, planes, strict=True)
        ]
        return functools.reduce(ptx.plus, counts)

    def _store_words(self, start: Pointer, run: Value, words: list[Value]) -> None:
        """Stores the run's words that are below k."""
        if self.words % _RUN_WORDS == 0:
            ptx.store(start, words)
            return
        for i, word in enumerate(words):
            with self._where(ptx.plus(ptx.times(run, _RUN_WORDS), i), self.words, _RUN_WORDS):
                ptx.store(ptx.advance(start, 4 * i), [word])

    def _where(self, index: Value, count: int, multiple: int) -> contextlib.AbstractContextManager:
        """`ptx.when(index < count)`; nothing if the count is a multiple, which no index reaches."""
        return ptx.when(ptx.less(index, count)) if count % multiple else contextlib.nullcontext()

    # At the end of a column the last 32 rows are loaded, and their bits shifted into place: no load needs a condition.

    def _existing(self, row: Value) -> Value:
        """The row, or the last row."""
        return ptx.smaller(row, self.k - 1) if self.k % _RUN else row

    def _window(self, row: Value) -> Value:
        """The row, or the last one that 32 rows start from."""
        return ptx.smaller(row, self.k - BLOCK) if self.k % _RUN else row

    def _up_to_k(self, word: Value, row: Value) -> Value:
        """The word that starts at `row`, from the word of its window; zeros beyond k."""
        missing = ptx.plus(row, ptx.times(self._window(row), -1))
        shifted = ptx.shift_right(word, ptx.smaller(missing, BLOCK - 1))
        return ptx.choose(ptx.less(missing, BLOCK), shifted, ptx.int32(0))
