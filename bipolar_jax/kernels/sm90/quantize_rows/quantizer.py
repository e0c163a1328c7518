"""What the threads of a warpgroup do with the rows of a slot: extremes, grid, rounding, packing.

The arithmetic is that of `kernels.semantics.activations.quantize_tokens` as XLA compiles it: a product that is added to
is not rounded, and a constant divisor is a factor.
"""

from __future__ import annotations

import dataclasses
import functools

from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.kernels.sm90.arithmetic.grid import RowGrid, row_grid
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.bit_transpose import CodeWords, byte_order_of, gather_words, transpose_to_planes
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.quantize_rows.activations import source_of
from bipolar_jax.kernels.sm90.quantize_rows.prologues import Source
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK, CODE_SUM, SUM_OF_INTEGERS, RowThreads


@dataclasses.dataclass(frozen=True)
class RowQuantizer:
    """Quantizes and packs the rows that are in one slot of shared memory.

    Attributes:
      m: rows of the whole array.
      k: numbers to quantize in each row.
      ptx_type: of x, "bf16", "f16" or "f32".
      prologue: applied to x first; each of its vectors is replaced by its PTX type.
      code_words: format and layout of the codes.
      row_words: words of a row of one plane in the output.
      threads: threads that share a row. A slot has WARPGROUP / threads rows.
      in_memory: whether slots are in global memory, as are the prologue's vectors.
    """

    m: int
    k: int
    ptx_type: str
    prologue: Prologue | None
    code_words: CodeWords
    row_words: int
    threads: int
    in_memory: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of 32 numbers in a row of codes, and in each part of a row of x."""
        return -(-self.k // BLOCK)

    @property
    def rows(self) -> int:
        """Rows in a slot."""
        return WARPGROUP // self.threads

    @property
    def planes(self) -> int:
        """Planes of the output."""
        return 1 if self.code_words.signed else self.code_words.a_format.bits

    def quantize(self, first_row, x, scratch, words, scale, zero_code, code_sums, *vectors) -> None:
        """Quantizes the rows of a slot; the warpgroup's threads leave together.

        Args:
          first_row: int32, index of the slot's first row.
          x: the slot, in shared or global memory: for each part of the prologue, rows of blocks * 32 numbers that are 0
            from k on.
          scratch: int32 [SCRATCH_WORDS] in shared memory, private to the warpgroup.
          words, scale, zero_code, code_sums: the outputs in global memory.
          *vectors: the prologue's, likewise, 0 from k on.
        """
        space = ptx.GLOBAL if self.in_memory else ptx.SHARED
        row = RowThreads(self.m, self.blocks, self.threads, first_row, scratch, space)
        source = source_of(self.prologue, self.ptx_type, self.k, row, x, list(vectors))
        grid = row_grid(self.code_words.a_format, *source.extremes())
        row.write(scale, ptx.as_word(grid.scale))
        row.write(zero_code, ptx.int32(0) if grid.zero is None else ptx.to_int(grid.zero))
        (total,) = row.combine({CODE_SUM: (SUM_OF_INTEGERS, self._pack(row, source, grid, words))})
        row.write(code_sums, ptx.plus(total, -self.code_words.least_code * self.k))
        row.leave()

    def _pack(self, row: RowThreads, source: Source, grid: RowGrid, words: Value) -> Value:
        """Rounds, packs and stores the row; returns the sum of this thread's codes."""
        codes, plane_bytes = self.code_words, 4 * self.row_words * self.m
        bases = {start: ptx.float32(codes.rounding_base(start) + codes.least_code) for start in codes.field_starts}
        # With one bit numbers from 0 on have the code 1.
        zero = ptx.float32(1) if grid.zero is None else grid.zero
        bases = {start: ptx.add(base, zero) for start, base in bases.items()}
        order = byte_order_of(row.swizzle)
        row_start = ptx.advance_far(ptx.pointer(words, ptx.GLOBAL), row.index, 4 * self.row_words)

        def encode(x: Value, field_start: int) -> Value:
            half = ptx.float32(0.5)
            steps = ptx.multiply(x, grid.half_steps) if grid.zero is None else ptx.fma(x, grid.half_steps, half)
            # The limit corrects ties at the upper end, which are rounded to one code too many, and makes a code of NaN.
            most = codes.rounding_base(field_start) + codes.least_code + codes.a_format.max_value
            rounded = ptx.at_most(ptx.add_down(steps, bases[field_start]), most)
            if codes.a_format.span < 1:  # numbers below the grid have its lowest code
                rounded = ptx.at_least(rounded, codes.rounding_base(field_start) + codes.least_code)
            return ptx.as_word(rounded)

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            rounded = [[encode(x, codes.field_start(i)) for i, x in enumerate(q)] for q in source.numbers(block)]
            packed = gather_words(codes, rounded, order)
            if position is not None:
                packed = [ptx.bits_of(word, self._valid_bits(i, position)) for i, word in enumerate(packed)]
            word_index, limit = (block, None) if position is None else (position, wanted)
            if codes.signed:
                row.write_eight(row_start, word_index, packed, limit)
            else:
                planes = transpose_to_planes(packed)[: codes.a_format.bits]
                row.write_planes(row_start, word_index, planes, plane_bytes, limit)
            if codes.width == 8:
                return [functools.reduce(lambda a, word: ptx.add_bytes(word, a, signed=codes.signed), packed, *values)]
            counts = [ptx.shift_left(ptx.count_ones(plane), i) for i, plane in enumerate(planes)]
            return [functools.reduce(ptx.plus, counts, *values)]

        wanted = self.blocks if codes.signed else self.row_words
        (total,) = row.over_blocks(visit, [ptx.int32(0)], wanted=wanted, partial=self.k % BLOCK != 0)
        return total

    def _valid_bits(self, word: int, position: Value) -> Value:
        """Mask of the fields of a block's word that are below k; the block is at `position`."""
        mask, last = ptx.int32(0xFFFFFFFF), self.blocks - 1
        if self.k % BLOCK:
            part = ptx.int32(self.code_words.valid_bits(word, self.k % BLOCK))
            mask = ptx.choose(ptx.equal(position, last), part, mask)
        return ptx.choose(ptx.less(position, last + 1), mask, ptx.int32(0))
