"""Sources: the numbers that a row is quantized from, computed from the row in shared memory by its prologue.

A row is visited several times, always in shared memory: for the statistics of a norm, for the extremes, and for the
codes. A thread visits the same blocks every time.

The functions are those of `kernels.semantics.prologue`; sums are in another order.
"""

from __future__ import annotations

import functools

import jax

from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import tree
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import (
    BLOCK,
    HIGH,
    LARGEST_FLOAT,
    LOW,
    SQUARES,
    SUM,
    SUM_OF_FLOATS,
    Combination,
    RowThreads,
)

Quarters = list[list[Value]]  # a block's 32 numbers in float32, eight in each quarter


class Source:
    """The slot's numbers unchanged; the base of the other sources."""

    def __init__(
        self, prologue: Prologue | None, ptx_type: str, k: int, row: RowThreads, x: Value, vectors: list[Value]
    ):
        """Of one row.

        Args:
          prologue: the prologue, with each vector replaced by its PTX type.
          ptx_type: of x, "bf16", "f16" or "f32".
          k: numbers to quantize.
          row: the row's threads.
          x: the slot in shared memory; every part of a row is filled up with zeros to whole blocks.
          vectors: the prologue's vectors in shared memory, filled up likewise.
        """
        self._prologue, self._ptx_type, self._k, self._row = prologue, ptx_type, k, row
        self._x = row.start_in_slot(x, ptx_type, 1 if prologue is None else prologue.parts)
        self._vectors = [ptx.pointer(vector, row.space) for vector in vectors]

    def numbers(self, block: Value) -> Quarters:
        """A block's numbers, without the row's factor that `extremes` returns."""
        return self._row.load_numbers(self._x, self._ptx_type, block)

    def extremes(self) -> tuple[Value, Value, Value | None]:
        """max(number, 0) and -min(number, 0) of the row in float32, NaN if it has any; and its factor, or None.

        Called before `numbers`.
        """
        row, ptx_type = self._row, self._ptx_type
        if ptx_type == "f32":
            return *self._extremes_of(lambda block, position: self.numbers(block)), None

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            return _widen(ptx_type, values, [word for q in row.load(self._x, ptx_type, block) for word in q])

        high, low = row.over_blocks(visit, [ptx.int32(0)] * 2, wanted=row.blocks)
        # So far each word holds two numbers. Here one word holds the maximum and the other numbers' magnitude.
        low = ptx.bits_of(low, 0x7FFF7FFF)
        larger = functools.partial(ptx.extreme, "max", ptx_type)
        both = larger(ptx.pick_bytes(high, low, 0x5410), ptx.pick_bytes(high, low, 0x7632))
        return *self._combined_extremes([ptx.as_word(x) for x in ptx.expand(ptx_type, both)]), None

    def _extremes_of(self, numbers) -> tuple[Value, Value]:
        """Extremes of numbers(block, position), which may be 0 where the thread has no block."""

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            return _widen("f32", values, [ptx.as_word(x) for q in numbers(block, position) for x in q])

        return self._combined_extremes(self._row.over_blocks(visit, [ptx.int32(0)] * 2, wanted=self._row.blocks))

    def _combined_extremes(self, values: list[Value]) -> tuple[Value, Value]:
        """The extremes over the row, from words of this thread's."""
        high, minus_low = self._row.combine(_extremes_to_combine(values))
        return ptx.as_float(high), ptx.as_float(minus_low)

    def _vector(self, which: int, block: Value) -> Quarters:
        """A block of the prologue's vector of that index, in the order of its fields."""
        return self._row.load_numbers(self._vectors[which], jax.tree.leaves(self._prologue)[which], block)

    def _sum(self, scratch_index: int, total: Value) -> Value:
        """The sum of the threads' totals over the row."""

        (total,) = self._row.combine({scratch_index: (SUM_OF_FLOATS, ptx.as_word(total))})
        return ptx.as_float(total)

    def _inverse_root(self, squares: Value) -> Value:
        """1 / sqrt(mean square + eps) of the row, from its sum of squares."""
        mean = ptx.divide(squares, ptx.float32(self._k))
        return ptx.rsqrt(ptx.add(mean, ptx.float32(self._prologue.eps)))


class RMSNormSource(Source):
    """r x g with r = 1 / sqrt(mean(x^2) + eps); r is the row's factor.

    One visit finds the mean square and the extremes of x g, and r costs nothing: it goes into the factor 1 / (2 scale)
    that the numbers are multiplied with anyway. Products x g of 16-bit numbers are exact.
    """

    def numbers(self, block: Value) -> Quarters:
        """x g."""
        return each(ptx.multiply, super().numbers(block), self._vector(0, block))

    def extremes(self) -> tuple[Value, Value, Value]:
        """The extremes of x g, and r."""
        row = self._row

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            numbers = row.load_numbers(self._x, self._ptx_type, block)
            total = zero_without_block(row, position, _sum_of_squares(numbers))
            products = each(ptx.multiply, numbers, self._vector(0, block))
            words = [ptx.as_word(x) for q in products for x in q]
            return [*_widen("f32", values[:2], words), ptx.add(values[2], total)]

        start = [ptx.int32(0), ptx.int32(0), ptx.float32(0)]
        *extremes, squares = row.over_blocks(visit, start, wanted=row.blocks)
        combined = _extremes_to_combine(extremes) | {SQUARES: (SUM_OF_FLOATS, ptx.as_word(squares))}
        high, minus_low, squares = map(ptx.as_float, self._row.combine(combined))
        return high, minus_low, self._inverse_root(squares)


class LayerNormSource(Source):
    """(x - mean) r g + b with r = 1 / sqrt(variance + eps): one visit for the mean, one for r, one for the extremes."""

    def numbers(self, block: Value) -> Quarters:
        """(x - mean) r g + b."""
        scaled = [[ptx.multiply(x, self._r) for x in q] for q in self._deviations(block)]
        return each(ptx.fma, scaled, self._vector(0, block), self._vector(1, block))

    def extremes(self) -> tuple[Value, Value, None]:
        """The extremes of `numbers`."""
        row = self._row

        def add_up(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            numbers = row.load_numbers(self._x, self._ptx_type, block)
            return [
                ptx.add(values[0], zero_without_block(row, position, tree(ptx.add, [x for q in numbers for x in q])))
            ]

        (total,) = row.over_blocks(add_up, [ptx.float32(0)], wanted=row.blocks)
        self._mean = ptx.divide(self._sum(SUM, total), ptx.float32(self._k))

        def add_squares(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            deviations = self._deviations(block)
            if position is not None and self._k % BLOCK:
                # The zeros that fill up the last block differ from the mean.
                wanted = ptx.choose(ptx.less(position, row.blocks - 1), ptx.int32(BLOCK), ptx.int32(self._k % BLOCK))
                deviations = row.first_of(deviations, wanted)
            return [ptx.add(values[0], zero_without_block(row, position, _sum_of_squares(deviations)))]

        partial = self._k % BLOCK != 0
        (squares,) = row.over_blocks(add_squares, [ptx.float32(0)], wanted=row.blocks, partial=partial)
        self._r = self._inverse_root(self._sum(SQUARES, squares))
        return *self._extremes_of(lambda block, position: self.numbers(block)), None

    def _deviations(self, block: Value) -> Quarters:
        return [[ptx.subtract(x, self._mean) for x in q] for q in super().numbers(block)]


def _widen(ptx_type: str, values: list[Value], words: list[Value]) -> list[Value]:
    """The maximum of the first value and all words, and the minimum of the second value and all words."""
    return [
        tree(functools.partial(ptx.extreme, kind, ptx_type), [value, *words])
        for kind, value in zip(("max", "min"), values, strict=True)
    ]


def _extremes_to_combine(values: list[Value]) -> dict[int, tuple[Combination, Value]]:
    """For `RowThreads.combine`, the words of a maximum and of a minimum, which are not below and not above 0."""
    return {HIGH: (LARGEST_FLOAT, values[0]), LOW: (LARGEST_FLOAT, ptx.bits_of(values[1], 0x7FFFFFFF))}


def each(function, *blocks: Quarters) -> Quarters:
    """function(*numbers) of the corresponding numbers of blocks."""
    return [[function(*numbers) for numbers in zip(*quarters, strict=True)] for quarters in zip(*blocks, strict=True)]


def _sum_of_squares(numbers: Quarters) -> Value:
    squares = [functools.reduce(lambda total, x: ptx.fma(x, x, total), q, ptx.float32(0)) for q in numbers]
    return tree(ptx.add, squares)


def zero_without_block(row: RowThreads, position: Value | None, number: Value) -> Value:
    """The number, or 0 if the thread has no block at the position."""
    return number if position is None else ptx.choose(ptx.less(position, row.blocks), number, ptx.float32(0))
