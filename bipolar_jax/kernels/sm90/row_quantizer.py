"""What the threads do with the blocks of their row: extremes, rounding, packing.

The arithmetic is that of `kernels.activations.quantize_tokens`, where the reasons are, as XLA
compiles it: a product that is added to is not rounded, and a constant divisor is a factor.
"""

from __future__ import annotations

import dataclasses
import functools

from bipolar_jax.kernels.prologue import Prologue
from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.bit_packing import CodeWords, byte_order_of, gather_words, transpose_to_planes
from bipolar_jax.kernels.sm90.instructions import Value
from bipolar_jax.kernels.sm90.row_activation import source_of
from bipolar_jax.kernels.sm90.row_source import Source
from bipolar_jax.kernels.sm90.row_threads import BLOCK, CODE_SUM, WARPGROUP, RowThreads
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
        row.write(scale, gpu.as_word(grid.scale))
        row.write(zero_code, gpu.int32(0) if grid.zero is None else gpu.to_int(grid.zero))
        (total,) = row.combine(gpu.plus, {CODE_SUM: self._pack(row, source, grid, words)})
        row.write(code_sums, gpu.plus(total, -self.code_words.least_code * self.k))
        row.leave()

    def _pack(self, row: RowThreads, source: Source, grid: _Grid, words: Value) -> Value:
        """Rounds, packs and stores the row; returns the sum of the codes that this thread packed."""
        codes, plane_bytes = self.code_words, 4 * self.row_words * self.m
        bases = {place: gpu.float32(codes.rounding_base(place) + codes.least_code) for place in codes.places}
        # The middle of the grid has the code 1 on the grid of one bit.
        zero = gpu.float32(1) if grid.zero is None else grid.zero
        bases = {place: gpu.add(base, zero) for place, base in bases.items()}
        order = byte_order_of(row.swizzle)
        row_start = gpu.advance_far(gpu.pointer(words, gpu.GLOBAL), row.index, 4 * self.row_words)

        def encode(x: Value, place: int) -> Value:
            half = gpu.float32(0.5)
            steps = gpu.multiply(x, grid.half_steps) if grid.zero is None else gpu.fma(x, grid.half_steps, half)
            # A tie at the upper end gives one code too many; and NaN becomes a code, too.
            most = codes.rounding_base(place) + codes.least_code + codes.a_format.max_value
            return gpu.as_word(gpu.at_most(gpu.add_down(steps, bases[place]), most))

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            rounded = [[encode(x, codes.place(i)) for i, x in enumerate(q)] for q in source.numbers(block)]
            packed = gather_words(codes, rounded, order)
            if position is not None:
                packed = [gpu.bits_of(word, self._valid_bits(i, position)) for i, word in enumerate(packed)]
            where, limit = (block, None) if position is None else (position, wanted)
            if codes.signed:
                row.write_eight(row_start, where, packed, limit)
            else:
                planes = transpose_to_planes(packed)[: codes.a_format.bits]
                row.write_planes(row_start, where, planes, plane_bytes, limit)
            if codes.width == 8:
                return [functools.reduce(lambda a, word: gpu.add_bytes(word, a, signed=codes.signed), packed, *values)]
            counts = [gpu.shift_left(gpu.count_ones(plane), i) for i, plane in enumerate(planes)]
            return [functools.reduce(gpu.plus, counts, *values)]

        wanted = self.blocks if codes.signed else self.row_words
        (total,) = row.over_blocks(visit, [gpu.int32(0)], wanted=wanted, partial=self.k % BLOCK != 0)
        return total

    def _valid_bits(self, word: int, position: Value) -> Value:
        """Mask of a word's fields that are below k, in the block at a position."""
        mask, last = gpu.int32(0xFFFFFFFF), self.blocks - 1
        if self.k % BLOCK:
            part = gpu.int32(self.code_words.valid_bits(word, self.k % BLOCK))
            mask = gpu.choose(gpu.equal(position, last), part, mask)
        return gpu.choose(gpu.less(position, last + 1), mask, gpu.int32(0))


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
    nothing, top = gpu.float32(0), code_words.a_format.max_value
    if top == 1:
        scale = gpu.as_float(gpu.extreme("max", "f32", gpu.as_word(high), gpu.as_word(minus_low)))
    else:
        half = gpu.float32(0.5)
        scale = gpu.multiply(gpu.add(gpu.multiply(high, half), gpu.multiply(minus_low, half)), gpu.float32(1 / top))
    if size is not None:
        scale = gpu.multiply(scale, size)
    scale = gpu.choose(gpu.is_greater(scale, LARGEST_SCALE), gpu.float32(float("inf")), scale)
    vanishes = gpu.is_less(scale, SMALLEST_SCALE)
    scale = gpu.choose(vanishes, nothing, scale)
    half_steps = gpu.divide(gpu.float32(0.5), gpu.choose(vanishes, gpu.float32(1), scale))
    half_steps = gpu.choose(vanishes, nothing, half_steps)
    if size is not None:
        half_steps = gpu.multiply(half_steps, size)
    if top == 1:
        return _Grid(scale, half_steps, None)
    zero = gpu.floor(gpu.fma(minus_low, half_steps, gpu.float32(0.5)))
    return _Grid(scale, half_steps, gpu.at_most(gpu.at_least(zero, 0.0), float(top)))
