"""What the threads do with the blocks of their row: extremes, rounding, packing.

The arithmetic is that of `kernels.activations.quantize_tokens`, where the reasons are, as XLA
compiles it: a product that is added to is not rounded, and a constant divisor is a factor.
"""

from __future__ import annotations

import dataclasses
import functools

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.bit_packing import CodeWords, byte_order_of, gather_words, transpose_to_planes
from bipolar_jax.kernels.sm90.instructions import Value
from bipolar_jax.kernels.sm90.row_threads import BLOCK, WARPGROUP, RowThreads, tree
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
      threads: how many share a row; a slot has a row for each of the warpgroup's shares.
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
        row = RowThreads(self.m, self.blocks, self.threads, first_row, scratch)
        source = _Source(self, row, x, gain)
        grid = _grid(self.code_words, *source.extremes())
        row.write(scale, gpu.as_word(grid.scale))
        row.write(zero_code, gpu.int32(0) if grid.zero is None else gpu.to_int(grid.zero))
        (total,) = row.combine(gpu.plus, {_CODE_SUM: self._pack(row, source, grid, words)})
        row.write(code_sums, gpu.plus(total, -self.code_words.least_code * self.k))
        row.leave()

    def _pack(self, row: RowThreads, source: _Source, grid: _Grid, words: Value) -> Value:
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


class _Source:
    """The numbers to quantize: those of the slot, times the gain if there is one.

    With a gain what is quantized is r x g, r being 1 / sqrt(mean(x^2) + eps) of the row. Products
    x g of 16-bit numbers are exact, their extremes are known as soon as r is, and r comes in
    only where numbers are multiplied anyway.
    """

    def __init__(self, quantizer: RowQuantizer, row: RowThreads, x: Value, gain: Value | None):
        self._quantizer, self._row = quantizer, row
        self._x = row.start_in_slot(x, quantizer.number)
        self._gain = None if gain is None else gpu.pointer(gain, gpu.SHARED)

    def numbers(self, block: Value) -> list[list[Value]]:
        """A block's numbers, 8 at a time."""
        return self._times_gain(self._row.load_numbers(self._x, self._quantizer.number, block), block)

    def _times_gain(self, numbers: list[list[Value]], block: Value) -> list[list[Value]]:
        if self._gain is None:
            return numbers
        gains = self._row.load_numbers(self._gain, self._quantizer.gain_number, block)
        return [
            [gpu.multiply(*pair) for pair in zip(*eights, strict=True)] for eights in zip(numbers, gains, strict=True)
        ]

    def extremes(self) -> tuple[Value, Value, Value | None]:
        """max(number, 0) and -min(number, 0) of the row in float32, NaN if it has any; and r."""
        if self._gain is not None:
            return self._extremes_and_size()
        number = self._quantizer.number

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            return _widen(number, values, [word for q in self._row.load(self._x, number, block) for word in q])

        high, low = self._row.over_blocks(visit, [gpu.int32(0)] * 2, wanted=self._row.blocks)
        larger = functools.partial(gpu.extreme, "max", number)
        if number == "f32":
            words = self._row.combine(larger, {_HIGH: high, _LOW: gpu.flip_bits(low, 0x80000000)})
            return gpu.as_float(words[0]), gpu.as_float(words[1]), None
        # Two numbers a word so far; from here the high one and minus the low one.
        minus_low = gpu.flip_bits(low, 0x80008000)
        both = larger(gpu.pick_bytes(high, minus_low, 0x5410), gpu.pick_bytes(high, minus_low, 0x7632))
        (both,) = self._row.combine(larger, {_HIGH: both})
        return *gpu.expand(number, both), None

    def _extremes_and_size(self) -> tuple[Value, Value, Value]:
        quantizer = self._quantizer

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            numbers = self._row.load_numbers(self._x, quantizer.number, block)
            squares = [functools.reduce(lambda total, x: gpu.fma(x, x, total), q, gpu.float32(0)) for q in numbers]
            total = tree(gpu.add, squares)
            if position is not None:
                total = gpu.choose(gpu.less(position, self._row.blocks), total, gpu.float32(0))
            products = [gpu.as_word(x) for q in self._times_gain(numbers, block) for x in q]
            return [*_widen("f32", values[:2], products), gpu.add(values[2], total)]

        start = [gpu.int32(0), gpu.int32(0), gpu.float32(0)]
        high, low, squares = self._row.over_blocks(visit, start, wanted=self._row.blocks)

        def add_words(a: Value, b: Value) -> Value:
            return gpu.as_word(gpu.add(gpu.as_float(a), gpu.as_float(b)))

        larger = functools.partial(gpu.extreme, "max", "f32")
        (squares,) = self._row.combine(add_words, {_SQUARES: gpu.as_word(squares)})
        high, minus_low = self._row.combine(larger, {_HIGH: high, _LOW: gpu.flip_bits(low, 0x80000000)})
        mean = gpu.divide(gpu.as_float(squares), gpu.float32(quantizer.k))
        size = gpu.rsqrt(gpu.add(mean, gpu.float32(quantizer.eps)))
        return gpu.as_float(high), gpu.as_float(minus_low), size


def _widen(number: str, values: list[Value], words: list[Value]) -> list[Value]:
    """The larger of the first value and all words, the smaller of the second and all."""
    return [
        tree(functools.partial(gpu.extreme, kind, number), [value, *words])
        for kind, value in zip(("max", "min"), values, strict=True)
    ]


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
