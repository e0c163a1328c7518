"""What the threads do with the blocks of their row: extremes, rounding, packing.

The arithmetic is that of `kernels.activations.quantize_tokens`, where the reasons are, as XLA
compiles it: a product that is added to is not rounded, and a constant divisor is a factor.
"""

from __future__ import annotations

import dataclasses
import functools

from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.bit_transpose import CodeWords, byte_order_of, gather_words, transpose_to_planes
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.quantize_rows.activations import source_of
from bipolar_jax.kernels.sm90.quantize_rows.prologues import Source
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK, CODE_SUM, RowThreads
from bipolar_jax.quantize.calibration import LARGEST_SCALE, SMALLEST_SCALE


@dataclasses.dataclass(frozen=True)
class RowQuantizer:
    """Quantizes and packs the rows that are in one slot of shared memory.

    Attributes:
      m, k: rows, and numbers quantized of each, of the whole of x.
      number: "bf16", "f16" or "f32", of x.
      prologue: what is done to x first, in place of its vectors what numbers they have.
      code_words: the codes and where they go.
      row_words: words of a row of one plane in the output.
      threads: how many share a row; a slot has a row for each of the warpgroup's shares.
    """

    m: int
    k: int
    number: str
    prologue: Prologue | None
    code_words: CodeWords
    row_words: int
    threads: int

    @property
    def blocks(self) -> int:
        """Of a row's codes, and of each part of a row of x."""
        return -(-self.k // BLOCK)

    @property
    def rows(self) -> int:
        """Rows in a slot."""
        return WARPGROUP // self.threads

    @property
    def planes(self) -> int:
        """Of the words in the output."""
        return 1 if self.code_words.signed else self.code_words.a_format.bits

    def quantize(self, first_row, x, scratch, words, scale, zero_code, code_sums, *vectors) -> None:
        """What a warpgroup does with a slot; its threads leave together.

        Args:
          first_row: int32, of the slot.
          x: the slot in shared memory, rows of blocks * 32 numbers that are 0 from k on, for each part of the prologue.
          scratch: int32 [SCRATCH_WORDS] in shared memory, of the warpgroup's own.
          words, scale, zero_code, code_sums: the outputs in global memory.
          *vectors: of the prologue, in shared memory, 0 from k on.
        """
        row = RowThreads(self.m, self.blocks, self.threads, first_row, scratch)
        source = source_of(self.prologue, self.number, self.k, row, x, list(vectors))
        grid = _grid(self.code_words, *source.extremes())
        row.write(scale, ptx.as_word(grid.scale))
        row.write(zero_code, ptx.int32(0) if grid.zero is None else ptx.to_int(grid.zero))
        (total,) = row.combine(ptx.plus, {CODE_SUM: self._pack(row, source, grid, words)})
        row.write(code_sums, ptx.plus(total, -self.code_words.least_code * self.k))
        row.leave()

    def _pack(self, row: RowThreads, source: Source, grid: _Grid, words: Value) -> Value:
        """Rounds, packs and stores the row; returns the sum of the codes that this thread packed."""
        codes, plane_bytes = self.code_words, 4 * self.row_words * self.m
        bases = {place: ptx.float32(codes.rounding_base(place) + codes.least_code) for place in codes.places}
        # The middle of the grid has the code 1 on the grid of one bit.
        zero = ptx.float32(1) if grid.zero is None else grid.zero
        bases = {place: ptx.add(base, zero) for place, base in bases.items()}
        order = byte_order_of(row.swizzle)
        row_start = ptx.advance_far(ptx.pointer(words, ptx.GLOBAL), row.index, 4 * self.row_words)

        def encode(x: Value, place: int) -> Value:
            half = ptx.float32(0.5)
            steps = ptx.multiply(x, grid.half_steps) if grid.zero is None else ptx.fma(x, grid.half_steps, half)
            # A tie at the upper end gives one code too many; and NaN becomes a code, too.
            most = codes.rounding_base(place) + codes.least_code + codes.a_format.max_value
            return ptx.as_word(ptx.at_most(ptx.add_down(steps, bases[place]), most))

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            rounded = [[encode(x, codes.place(i)) for i, x in enumerate(q)] for q in source.numbers(block)]
            packed = gather_words(codes, rounded, order)
            if position is not None:
                packed = [ptx.bits_of(word, self._valid_bits(i, position)) for i, word in enumerate(packed)]
            where, limit = (block, None) if position is None else (position, wanted)
            if codes.signed:
                row.write_eight(row_start, where, packed, limit)
            else:
                planes = transpose_to_planes(packed)[: codes.a_format.bits]
                row.write_planes(row_start, where, planes, plane_bytes, limit)
            if codes.width == 8:
                return [functools.reduce(lambda a, word: ptx.add_bytes(word, a, signed=codes.signed), packed, *values)]
            counts = [ptx.shift_left(ptx.count_ones(plane), i) for i, plane in enumerate(planes)]
            return [functools.reduce(ptx.plus, counts, *values)]

        wanted = self.blocks if codes.signed else self.row_words
        (total,) = row.over_blocks(visit, [ptx.int32(0)], wanted=wanted, partial=self.k % BLOCK != 0)
        return total

    def _valid_bits(self, word: int, position: Value) -> Value:
        """Mask of a word's fields that are below k, in the block at a position."""
        mask, last = ptx.int32(0xFFFFFFFF), self.blocks - 1
        if self.k % BLOCK:
            part = ptx.int32(self.code_words.valid_bits(word, self.k % BLOCK))
            mask = ptx.choose(ptx.equal(position, last), part, mask)
        return ptx.choose(ptx.less(position, last + 1), mask, ptx.int32(0))


@dataclasses.dataclass(frozen=True)
class _Grid:
    """`spanning_grid` of a row.

    Attributes:
      scale: float32.
      half_steps: 1 / (2 scale), what to multiply the source's numbers by.
      zero: the code of zero as a float; None for one bit.
    """

    scale: Value
    half_steps: Value
    zero: Value | None


def _grid(code_words: CodeWords, high: Value, minus_low: Value, size: Value | None) -> _Grid:
    """The grid of numbers from -minus_low to high, all of them times the size if there is one."""
    nothing, top = ptx.float32(0), code_words.a_format.max_value
    if top == 1:
        scale = ptx.as_float(ptx.extreme("max", "f32", ptx.as_word(high), ptx.as_word(minus_low)))
    else:
        half = ptx.float32(0.5)
        scale = ptx.multiply(ptx.add(ptx.multiply(high, half), ptx.multiply(minus_low, half)), ptx.float32(1 / top))
    if size is not None:
        scale = ptx.multiply(scale, size)
    scale = ptx.choose(ptx.is_greater(scale, LARGEST_SCALE), ptx.float32(float("inf")), scale)
    vanishes = ptx.is_less(scale, SMALLEST_SCALE)
    scale = ptx.choose(vanishes, nothing, scale)
    half_steps = ptx.divide(ptx.float32(0.5), ptx.choose(vanishes, ptx.float32(1), scale))
    half_steps = ptx.choose(vanishes, nothing, half_steps)
    if size is not None:
        half_steps = ptx.multiply(half_steps, size)
    if top == 1:
        return _Grid(scale, half_steps, None)
    zero = ptx.floor(ptx.fma(minus_low, half_steps, ptx.float32(0.5)))
    return _Grid(scale, half_steps, ptx.at_most(ptx.at_least(zero, 0.0), float(top)))
