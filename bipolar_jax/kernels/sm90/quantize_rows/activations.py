"""Sources of rows that an activation function or a rotation is applied to, and the choice of a row's source."""

from __future__ import annotations

from bipolar_jax.kernels.semantics.hadamard import Hadamard
from bipolar_jax.kernels.semantics.prologue import Activation, LayerNorm, Prologue, RMSNorm, rotation_of
from bipolar_jax.kernels.sm90.arithmetic.value_activations import OF_VALUES
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.quantize_rows.prologues import (
    LayerNormSource,
    Quarters,
    RMSNormSource,
    Source,
    each,
    zero_without_block,
)
from bipolar_jax.kernels.sm90.quantize_rows.row_threads import RowThreads


class RotatedSource(Source):
    """The rotation of the slot's numbers."""

    def numbers(self, block: Value) -> Quarters:
        """Computed at every visit."""
        return self._rotated(self._loaded(block))

    def extremes(self) -> tuple[Value, Value, None]:
        """The extremes of `numbers`."""

        def numbers(block: Value, position: Value | None) -> Quarters:
            # A thread without a block has rotated the last block with itself.
            return [[zero_without_block(self._row, position, x) for x in q] for q in self.numbers(block)]

        return *self._extremes_of(numbers), None

    def _loaded(self, block: Value) -> Quarters:
        return self._row.load_numbers(self._x, self._ptx_type, block)

    def _rotated(self, numbers: Quarters) -> Quarters:
        """The numbers of a block, rotated if the prologue says so."""
        rotation = rotation_of(self._prologue)
        return numbers if rotation is None else self._row.rotate(numbers, rotation.block)


class ActivationSource(RotatedSource):
    """function(x), rotated if the prologue says so."""

    def numbers(self, block: Value) -> Quarters:
        """Computed at every visit."""
        function = OF_VALUES[self._prologue.function]
        return self._rotated([[function(x) for x in q] for q in self._loaded(block)])


class GatedSource(RotatedSource):
    """function(gate) * up, rotated if the prologue says so; computed once and stored in float32 over the row.

    With a 16-bit dtype a block of gates and a block of `up` together have the size of their float32 products: the first
    half of a quarter's products overwrites the quarter's gates, the second half its `up`. One thread reads and writes
    a block; what a thread without a block reads is not used.
    """

    def __init__(self, prologue: Prologue, ptx_type: str, k: int, row: RowThreads, x: Value, vectors: list[Value]):
        """See `Source`; a row of the slot is gates, then the numbers that they multiply."""
        super().__init__(prologue, ptx_type, k, row, x, vectors)
        self._up = row.next_part(self._x, ptx_type)

    def numbers(self, block: Value) -> Quarters:
        """The numbers that `extremes` stored."""
        if self._ptx_type == "f32":
            return self._loaded(block)
        halves = zip(*(self._row.load(at, self._ptx_type, block) for at in (self._x, self._up)), strict=True)
        return [[ptx.as_float(word) for word in (*first, *second)] for first, second in halves]

    def extremes(self) -> tuple[Value, Value, None]:
        """Computes and stores the numbers, and returns their extremes."""
        function = OF_VALUES[self._prologue.function]

        def products(block: Value, position: Value | None) -> Quarters:
            gates, ups = (self._row.load_numbers(at, self._ptx_type, block) for at in (self._x, self._up))
            numbers = self._rotated(each(lambda gate, up: ptx.multiply(function(gate), up), gates, ups))
            self._store(block, position, numbers)
            return [[zero_without_block(self._row, position, x) for x in q] for q in numbers]

        extremes = self._extremes_of(products)
        ptx.order_before_copies()
        return *extremes, None

    def _store(self, block: Value, position: Value | None, products: Quarters) -> None:
        words = [[ptx.as_word(x) for x in q] for q in products]
        if self._ptx_type == "f32":
            self._row.store(self._x, self._ptx_type, block, position, words)
        else:
            self._row.store(self._x, self._ptx_type, block, position, [q[:4] for q in words])
            self._row.store(self._up, self._ptx_type, block, position, [q[4:] for q in words])


def source_of(
    prologue: Prologue | None, ptx_type: str, k: int, row: RowThreads, x: Value, vectors: list[Value]
) -> Source:
    """The source that computes a prologue; arguments as of `Source`."""
    kinds = {
        RMSNorm: RMSNormSource,
        LayerNorm: LayerNormSource,
        Activation: ActivationSource,
        Hadamard: RotatedSource,
        type(None): Source,
    }
    gated = isinstance(prologue, Activation) and prologue.gated
    kind = GatedSource if gated else kinds[type(prologue)]
    return kind(prologue, ptx_type, k, row, x, vectors)
