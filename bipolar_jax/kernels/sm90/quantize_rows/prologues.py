"""The numbers that a row is quantized from: those of the slot, after what the prologue does to them.

A row is gone over several times, always in shared memory: for what the prologue wants to know of all of
it, for its extremes, and for the codes. A thread visits the same blocks every time.

The functions are those of `kernels.prologue`, sums in an order of their own.
"""

from __future__ import annotations

import functools

import jax

from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import tree
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import BLOCK, HIGH, LOW, SQUARES, SUM, RowThreads

Eights = list[list[Value]]  # a block's numbers in float32, 8 at a time


class Source:
    """The slot's numbers as they are; others add to it."""

    def __init__(self, prologue: Prologue | None, number: str, k: int, row: RowThreads, x: Value, vectors: list[Value]):
        """Of one row.

        Args:
          prologue: its vectors replaced by what numbers they have.
          number: "bf16", "f16" or "f32", of x.
          k: numbers to quantize.
          row: the row's threads.
          x: the slot in shared memory; every part of a row is filled up with zeros to whole blocks.
          vectors: of the prologue in shared memory, likewise.
        """
        self._prologue, self._number, self._k, self._row = prologue, number, k, row
        self._x = row.start_in_slot(x, number, 1 if prologue is None else prologue.parts)
        self._vectors = [ptx.pointer(vector, ptx.SHARED) for vector in vectors]

    def numbers(self, block: Value) -> Eights:
        """A block's numbers, less a factor of the whole row that `extremes` returns."""
        return self._row.load_numbers(self._x, self._number, block)

    def extremes(self) -> tuple[Value, Value, Value | None]:
        """max(number, 0) and -min(number, 0) of the row in float32, NaN if it has any; and the factor, if there is one.

        Before `numbers`.
        """
        row, number = self._row, self._number
        if number == "f32":
            return *self._extremes_of(lambda block, position: self.numbers(block)), None

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            return _widen(number, values, [word for q in row.load(self._x, number, block) for word in q])

        high, low = row.over_blocks(visit, [ptx.int32(0)] * 2, wanted=row.blocks)
        # Two numbers a word so far; from here the high one and minus the low one.
        larger = functools.partial(ptx.extreme, "max", number)
        minus_low = ptx.flip_bits(low, 0x80008000)
        both = larger(ptx.pick_bytes(high, minus_low, 0x5410), ptx.pick_bytes(high, minus_low, 0x7632))
        (both,) = row.combine(larger, {HIGH: both})
        return *ptx.expand(number, both), None

    def _extremes_of(self, numbers) -> tuple[Value, Value]:
        """Of numbers(block, position), which may give 0 for those that are not there."""

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            return _widen("f32", values, [ptx.as_word(x) for q in numbers(block, position) for x in q])

        return self._combined_extremes(self._row.over_blocks(visit, [ptx.int32(0)] * 2, wanted=self._row.blocks))

    def _combined_extremes(self, values: list[Value]) -> tuple[Value, Value]:
        larger = functools.partial(ptx.extreme, "max", "f32")
        words = self._row.combine(larger, {HIGH: values[0], LOW: ptx.flip_bits(values[1], 0x80000000)})
        return ptx.as_float(words[0]), ptx.as_float(words[1])

    def _vector(self, which: int, block: Value) -> Eights:
        """A block of one of the prologue's vectors, in the order of its fields."""
        return self._row.load_numbers(self._vectors[which], jax.tree.leaves(self._prologue)[which], block)

    def _sum(self, place: int, words: Value) -> Value:
        """Of the row, from the sums that its threads made."""

        def add_words(a: Value, b: Value) -> Value:
            return ptx.as_word(ptx.add(ptx.as_float(a), ptx.as_float(b)))

        (total,) = self._row.combine(add_words, {place: ptx.as_word(words)})
        return ptx.as_float(total)

    def _size(self, squares: Value) -> Value:
        """1 / sqrt(mean + eps), from this thread's sum of squares."""
        mean = ptx.divide(self._sum(SQUARES, squares), ptx.float32(self._k))
        return ptx.rsqrt(ptx.add(mean, ptx.float32(self._prologue.eps)))


class RMSNormSource(Source):
    """What is quantized is r x g, r being 1 / sqrt(mean(x^2) + eps) of the row.

    Products x g of 16-bit numbers are exact, their extremes are known as soon as r is, and r comes in
    only where numbers are multiplied anyway.
    """

    def numbers(self, block: Value) -> Eights:
        """x g."""
        return each(ptx.multiply, super().numbers(block), self._vector(0, block))

    def extremes(self) -> tuple[Value, Value, Value]:
        """Of x g; and r."""
        row = self._row

        def visit(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            numbers = row.load_numbers(self._x, self._number, block)
            total = present(row, position, _sum_of_squares(numbers))
            products = each(ptx.multiply, numbers, self._vector(0, block))
            words = [ptx.as_word(x) for q in products for x in q]
            return [*_widen("f32", values[:2], words), ptx.add(values[2], total)]

        start = [ptx.int32(0), ptx.int32(0), ptx.float32(0)]
        *extremes, squares = row.over_blocks(visit, start, wanted=row.blocks)
        size = self._size(squares)
        return *self._combined_extremes(extremes), size


class LayerNormSource(Source):
    """(x - mean) r g + b, which wants to know the mean first, then r, then the extremes."""

    def numbers(self, block: Value) -> Eights:
        """What is quantized."""
        scaled = [[ptx.multiply(x, self._r) for x in q] for q in self._deviations(block)]
        return each(ptx.fma, scaled, self._vector(0, block), self._vector(1, block))

    def extremes(self) -> tuple[Value, Value, None]:
        """Those of `numbers`."""
        row = self._row

        def add_up(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            numbers = row.load_numbers(self._x, self._number, block)
            return [ptx.add(values[0], present(row, position, tree(ptx.add, [x for q in numbers for x in q])))]

        (total,) = row.over_blocks(add_up, [ptx.float32(0)], wanted=row.blocks)
        self._mean = ptx.divide(self._sum(SUM, total), ptx.float32(self._k))

        def add_squares(block: Value, position: Value | None, values: list[Value]) -> list[Value]:
            deviations = self._deviations(block)
            if position is not None and self._k % BLOCK:
                # What fills up the last block differs from the mean, too.
                wanted = ptx.choose(ptx.less(position, row.blocks - 1), ptx.int32(BLOCK), ptx.int32(self._k % BLOCK))
                deviations = row.first_of(deviations, wanted)
            return [ptx.add(values[0], present(row, position, _sum_of_squares(deviations)))]

        partial = self._k % BLOCK != 0
        (squares,) = row.over_blocks(add_squares, [ptx.float32(0)], wanted=row.blocks, partial=partial)
        self._r = self._size(squares)
        return *self._extremes_of(lambda block, position: self.numbers(block)), None

    def _deviations(self, block: Value) -> Eights:
        return [[ptx.subtract(x, self._mean) for x in q] for q in super().numbers(block)]


def _widen(number: str, values: list[Value], words: list[Value]) -> list[Value]:
    """The larger of the first value and all words, the smaller of the second and all."""
    return [
        tree(functools.partial(ptx.extreme, kind, number), [value, *words])
        for kind, value in zip(("max", "min"), values, strict=True)
    ]


def each(function, *blocks: Eights) -> Eights:
    return [[function(*numbers) for numbers in zip(*eights, strict=True)] for eights in zip(*blocks, strict=True)]


def _sum_of_squares(numbers: Eights) -> Value:
    squares = [functools.reduce(lambda total, x: ptx.fma(x, x, total), q, ptx.float32(0)) for q in numbers]
    return tree(ptx.add, squares)


def present(row: RowThreads, position: Value | None, number: Value) -> Value:
    """The number, 0 if the thread has no block at the position."""
    return number if position is None else ptx.choose(ptx.less(position, row.blocks), number, ptx.float32(0))
