"""What the threads do with the blocks of their row: extremes, rounding, packing.

The arithmetic is that of `kernels.activations.quantize_tokens`, where the reasons are, as XLA
compiles it: a product that is added to is not rounded, and a constant divisor is a factor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.bit_packing import CodeWords, byte_order_of, gather_words, transpose_to_planes
from bipolar_jax.kernels.sm90.instructions import Pointer, Value
from bipolar_jax.kernels.sm90.row_threads import BLOCK, WARP, WARPGROUP, WARPS, RowThreads, tree
from bipolar_jax.quantize.calibration import LARGEST_SCALE, SMALLEST_SCALE

SCRATCH_WORDS = 16  # of shared memory for a warpgroup's sums and extremes over its four warps
_HIGH, _LOW, _CODE_SUM, _SQUARES = 0, 4, 8, 12  # where in it


@dataclasses.dataclass(frozen=True)
class RowQuantizer:
    """Quantizes and packs the rows that are in one slot of shared memory.

    Attributes:
      m, k: rows, and numbers a row, of the whole of x.
      number, gain_number: "bf16", "f16" or "f32", of x and of the gain (None: no RMSNorm).
      eps: of the RMSNorm.
      code_words: the codes and where they go.
      row_words: words of a row of one plane in the output.
      threads: how many share a row, WARP (four rows in a slot) or WARPGROUP (one).
    """

    m: int
    k: int
    number: str
    gain_number: str | None
    eps: float
    code_words: CodeWords
    row_words: int
    threads: int

    @property
    def blocks(self) -> int:
        return -(-self.k // BLOCK)

    @property
    def rows(self) -> int:
        """Rows in a slot."""
        return WARPGROUP // self.threads

    @property
    def planes(self) -> int:
        """Of the words in the output."""
        return 1 if self.code_words.signed else self.code_words.a_format.bits

    def quantize(self, first_row, x, scratch, words, scale, zero_code, code_sums, gain=None) -> None:
        """What a warpgroup does with a slot; its threads leave together.

        Args:
          first_row: int32, of the slot.
          x: the slot in shared memory, rows of blocks * 32 numbers that are 0 from k on.
          scratch: int32 [SCRATCH_WORDS] in shared memory, of the warpgroup's own.
          words, scale, zero_code, code_sums: the outputs in global memory.
          gain: in shared memory, 0 from k on.
        """
        row = RowThreads(self.blocks, self.threads, first_row, scratch)
        with self._if_within_m(row):
            source = _Source(self, row, x, gain)
            row_scale, half_steps, zero = _grid(self.code_words, *source.extremes())
            row.write(scale, gpu.as_word(row_scale))
            row.write(zero_code, gpu.int32(0) if zero is None else gpu.to_int(zero))
            total = gpu.sum_over_warp(self._pack(row, source, half_steps, zero, words))
            if self.threads == WARP:
                row.write(code_sums, self._unsigned_sum(total))
            else:
                row.share(_CODE_SUM, total)
        gpu.synchronize()
        if self.threads == WARPGROUP:
            row.write(code_sums, self._unsigned_sum(tree(gpu.plus, row.shared(_CODE_SUM))))

    @contextlib.contextmanager
    def _if_within_m(self, row: RowThreads) -> Iterator[None]:
        """The last slot of four rows may reach beyond the last row."""
        if self.threads == WARP and self.m % WARPS:
            with gpu.when(gpu.less(row.index, self.m)):
                yield
        else:
            yield

    def _unsigned_sum(self, total: Value) -> Value:
        return gpu.plus(total, -self.code_words.least_code * self.k)

    def _pack(self, row: RowThreads, source: _Source, half_steps: Value, zero: Value | None, words: Value) -> Value:
        """Rounds, packs and stores the row; returns the sum of the codes that this thread packed."""
        codes = self.code_words
        bases = {place: gpu.float32(codes.rounding_base(place) + codes.least_code) for place in codes.places}
        # The middle of the grid has the code 1 on the grid of one bit.
        bases = {place: gpu.add(base, gpu.float32(1) if zero is None else zero) for place, base in bases.items()}
        order = byte_order_of(row.swizzle)
        row_start = gpu.advance_far(gpu.pointer(words, gpu.GLOBAL), row.index, 4 * self.row_words)

        def encode(x: Value, place: int) -> Value:
            steps = gpu.multiply(x, half_steps) if zero is None else gpu.fma(x, half_steps, gpu.float32(0.5))
            # A tie at the upper end gives one code too many; and NaN becomes a code, too.
            most = codes.rounding_base(place) + codes.least_code + codes.a_format.max_value
            return gpu.as_word(gpu.at_most(gpu.add_down(steps, bases[place]), most))

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            rounded = [[encode(x, codes.place(i)) for i, x in enumerate(q)] for q in source.numbers(block)]
            packed = gather_words(codes, rounded, order)
            if position is not None:
                packed = [gpu.bits_of(word, self._valid_bits(i, position)) for i, word in enumerate(packed)]
            if codes.signed:
                limit = None if position is None else self.blocks
                row.write_eight(row_start, block if position is None else position, packed, limit)
            else:
                planes = transpose_to_planes(packed)[: codes.a_format.bits]
                self._write_planes(row_start, block, position, planes)
            if codes.width == 8:
                return [functools.reduce(lambda a, word: gpu.add_bytes(word, a, signed=codes.signed), packed, *values)]
            counts = [gpu.shift_left(gpu.count_ones(plane), i) for i, plane in enumerate(planes)]
            return [functools.reduce(gpu.plus, counts, *values)]

        wanted = self.blocks if codes.signed else self.row_words
        (total,) = row.over_blocks(visit, [gpu.int32(0)], wanted=wanted, partial=self.k % BLOCK != 0)
        return total

    def _write_planes(self, row_start: Pointer, block: Value, position: Value | None, planes: list[Value]) -> None:
        inside = contextlib.nullcontext() if position is None else gpu.when(gpu.less(position, self.row_words))
        with inside:
            start = gpu.advance(row_start, gpu.times(block if position is None else position, 4))
            for i, plane in enumerate(planes):
                gpu.store(gpu.advance_far(start, i, 4 * self.row_words * self.m), [plane])

    def _valid_bits(self, word: int, position: Value) -> Value:
        """Mask of a word's fields that are below k, in the block at a position."""
        mask, last = gpu.int32(0xFFFFFFFF), self.blocks - 1
        if self.k % BLOCK:
            part = gpu.int32(self.code_words.valid_bits(word, self.k % BLOCK))
            mask = gpu.choose(gpu.equal(position, last), part, mask)
        return gpu.choose(gpu.less(position, last + 1), mask, gpu.int32(0))


class _Source:
    """The numbers to quantize: those of the slot, normalized if they are to be."""

    def __init__(self, quantizer: RowQuantizer, row: RowThreads, x: Value, gain: Value | None):
        self._quantizer, self._row = quantizer, row
        self._x = row.start_in_slot(x, quantizer.number)
        if gain is not None:
            self._gain = gpu.pointer(gain, gpu.SHARED)
            self._reciprocal_size = self._reciprocal_rms()

    def numbers(self, block: Value) -> list[list[Value]]:
        """A block's numbers, 8 at a time."""
        quarters = self._row.load_numbers(self._x, self._quantizer.number, block)
        gain_number = self._quantizer.gain_number
        if gain_number is None:
            return quarters
        gains = self._row.load_numbers(self._gain, gain_number, block)
        return [
            [gpu.multiply(gpu.multiply(x, self._reciprocal_size), gain) for x, gain in zip(*eights, strict=True)]
            for eights in zip(quarters, gains, strict=True)
        ]

    def extremes(self) -> tuple[Value, Value]:
        """max(x, 0) and -min(x, 0) of the row in float32, NaN if it has any."""
        normalized = self._quantizer.gain_number is not None
        number = "f32" if normalized else self._quantizer.number

        def widen(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            if normalized:
                words = [gpu.as_word(x) for q in self.numbers(block) for x in q]
            else:
                words = [word for q in self._row.load(self._x, number, block) for word in q]
            return [
                tree(functools.partial(gpu.extreme, kind, number), [value, *words])
                for kind, value in zip(("max", "min"), values, strict=True)
            ]

        zeros = [gpu.int32(0), gpu.int32(0)]
        high, low = self._row.over_blocks(widen, zeros, wanted=self._row.blocks)
        larger = functools.partial(gpu.extreme, "max", number)
        if number == "f32":
            words = self._row.combine(larger, {_HIGH: high, _LOW: gpu.flip_bits(low, 0x80000000)})
            return gpu.as_float(words[0]), gpu.as_float(words[1])
        # Two numbers a word so far; from here the high one and minus the low one.
        minus_low = gpu.flip_bits(low, 0x80008000)
        both = larger(gpu.pick_bytes(high, minus_low, 0x5410), gpu.pick_bytes(high, minus_low, 0x7632))
        (both,) = self._row.combine(larger, {_HIGH: both})
        high, minus_low = gpu.expand(number, both)
        return high, minus_low

    def _reciprocal_rms(self) -> Value:
        """1 / sqrt(mean(x^2) + eps) in float32."""

        def add_squares(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            quarters = self._row.load_numbers(self._x, self._quantizer.number, block)
            sums = [functools.reduce(lambda total, x: gpu.fma(x, x, total), q, gpu.float32(0)) for q in quarters]
            total = tree(gpu.add, sums)
            if position is not None:
                total = gpu.choose(gpu.less(position, self._row.blocks), total, gpu.float32(0))
            return [gpu.add(values[0], total)]

        def add_words(a: Value, b: Value) -> Value:
            return gpu.as_word(gpu.add(gpu.as_float(a), gpu.as_float(b)))

        (total,) = self._row.over_blocks(add_squares, [gpu.float32(0)], wanted=self._row.blocks)
        (total,) = self._row.combine(add_words, {_SQUARES: gpu.as_word(total)})
        mean = gpu.divide(gpu.as_float(total), gpu.float32(self._quantizer.k))
        return gpu.rsqrt(gpu.add(mean, gpu.float32(self._quantizer.eps)))


def _grid(code_words: CodeWords, high: Value, minus_low: Value) -> tuple[Value, Value, Value | None]:
    """`spanning_grid` of a row: scale, 1 / (2 scale), and the code of zero as a float (None for one bit)."""
    zero, top = gpu.float32(0), code_words.a_format.max_value
    if top == 1:
        scale = gpu.as_float(gpu.extreme("max", "f32", gpu.as_word(high), gpu.as_word(minus_low)))
    else:
        half = gpu.float32(0.5)
        half_range = gpu.add(gpu.multiply(high, half), gpu.multiply(minus_low, half))
        scale = gpu.multiply(half_range, gpu.float32(1 / top))
    scale = gpu.choose(gpu.is_greater(scale, LARGEST_SCALE), gpu.float32(float("inf")), scale)
    vanishes = gpu.is_less(scale, SMALLEST_SCALE)
    scale = gpu.choose(vanishes, zero, scale)
    half_steps = gpu.divide(gpu.float32(0.5), gpu.choose(vanishes, gpu.float32(1), scale))
    half_steps = gpu.choose(vanishes, zero, half_steps)
    if top == 1:
        return scale, half_steps, None
    zero_code = gpu.floor(gpu.fma(minus_low, half_steps, gpu.float32(0.5)))
    return scale, half_steps, gpu.at_most(gpu.at_least(zero_code, 0.0), float(top))
