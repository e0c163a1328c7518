"""Activation functions of a row's numbers, and the choice of a row's source."""

from __future__ import annotations

import math

from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, Prologue, RMSNorm
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.quantize_rows.prologues import (
    Eights,
    LayerNormSource,
    RMSNormSource,
    Source,
    each,
    present,
)
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import RowThreads


class ActivationSource(Source):
    """function(x)."""

    def numbers(self, block: Value) -> Eights:
        """Computed every time."""
        function = _FUNCTIONS[self._prologue.function]
        return [[function(x) for x in q] for q in super().numbers(block)]

    def extremes(self) -> tuple[Value, Value, None]:
        """Those of `numbers`."""
        return *self._extremes_of(lambda block, position: self.numbers(block)), None


class GatedSource(Source):
    """function(gate) * up: computed once, and kept in float32 where the row was in shared memory.

    Of 16-bit numbers a block of the gate and one of `up` together have the size of their products: those of
    a quarter go where the quarter's gates were and where its other numbers were, half and half. A block's
    numbers are read and written by one thread; what a thread that has no block left reads is not used.
    """

    def __init__(self, prologue: Prologue, number: str, k: int, row: RowThreads, x: Value, vectors: list[Value]):
        """See `Source`; a row of the slot is gates, then what they are for."""
        super().__init__(prologue, number, k, row, x, vectors)
        self._up = row.next_part(self._x, number)

    def numbers(self, block: Value) -> Eights:
        """Those that `extremes` left."""
        if self._number == "f32":
            return super().numbers(block)
        halves = zip(*(self._row.load(at, self._number, block) for at in (self._x, self._up)), strict=True)
        return [[ptx.as_float(word) for word in (*first, *second)] for first, second in halves]

    def extremes(self) -> tuple[Value, Value, None]:
        """Computes, and keeps, what is quantized."""
        function = _FUNCTIONS[self._prologue.function]

        def products(block: Value, position: Value | None) -> Eights:
            gates, ups = (self._row.load_numbers(at, self._number, block) for at in (self._x, self._up))
            made = each(lambda gate, up: ptx.multiply(function(gate), up), gates, ups)
            self._keep(block, position, made)
            return [[present(self._row, position, x) for x in q] for q in made]

        extremes = self._extremes_of(products)
        ptx.order_before_copies()
        return *extremes, None

    def _keep(self, block: Value, position: Value | None, products: Eights) -> None:
        words = [[ptx.as_word(x) for x in q] for q in products]
        if self._number == "f32":
            self._row.store(self._x, self._number, block, position, words)
        else:
            self._row.store(self._x, self._number, block, position, [q[:4] for q in words])
            self._row.store(self._up, self._number, block, position, [q[4:] for q in words])


def source_of(
    prologue: Prologue | None, number: str, k: int, row: RowThreads, x: Value, vectors: list[Value]
) -> Source:
    """The source that computes a prologue; arguments as `Source` has them."""
    kinds = {RMSNorm: RMSNormSource, LayerNorm: LayerNormSource, Activation: ActivationSource, type(None): Source}
    gated = isinstance(prologue, Activation) and prologue.gated
    kind = GatedSource if gated else kinds[type(prologue)]
    return kind(prologue, number, k, row, x, vectors)


def _logistic_product(x: Value, argument: Value, factor: float) -> Value:
    """x / (1 + exp(-factor * argument)), good to some 2^-20."""
    power = ptx.exp2(ptx.multiply(argument, ptx.float32(-factor * math.log2(math.e))))
    return ptx.multiply(x, ptx.reciprocal(ptx.add(power, ptx.float32(1))))


def _silu(x: Value) -> Value:
    return _logistic_product(x, x, 1.0)


def _gelu(x: Value) -> Value:
    """x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    cubic = ptx.fma(ptx.multiply(ptx.multiply(x, x), ptx.float32(0.044715)), x, x)
    return _logistic_product(x, cubic, 2 * math.sqrt(2 / math.pi))


def _relu(x: Value) -> Value:
    return ptx.as_float(ptx.extreme("max", "f32", ptx.as_word(x), ptx.int32(0)))


_FUNCTIONS = {"silu": _silu, "gelu": _gelu, "relu": _relu}
