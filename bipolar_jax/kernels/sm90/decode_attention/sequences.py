"""The sequences of a warpgroup, and its turns: tiles of positions, counted through all of its sequences."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core.branches import as_integer
from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, AttentionPlan

Index = Int[Array, ""] | int


class OwnSequences:
    """What a warpgroup does: of each of its sequences every `parts`-th tile, up to the positions that the cache holds.

    Loads of a sequence's first tiles are under way while the one before is finished.
    """

    def __init__(self, plan: AttentionPlan, lengths, rank: Index):
        """Of the warpgroup of this rank among the `parts` that divide positions; `lengths` is a ref."""
        self._plan, self._rank = plan, rank
        own = [lax.axis_index("sequence") + i * lax.axis_size("sequence") for i in range(plan.sequences)]
        self._sequences, self._lengths = own, [lengths[sequence] for sequence in own]
        self._seen = [jnp.minimum(length, plan.capacity) for length in self._lengths]
        tiles = [lax.div(seen + plan.positions - 1, plan.positions) for seen in self._seen]
        self._turns = [lax.div(each - rank + plan.parts - 1, plan.parts) for each in tiles]
        self._starts = [sum(self._turns[:i], start=jnp.int32(0)) for i in range(plan.sequences)]

    @property
    def all_turns(self) -> Index:
        """Turns of all sequences."""
        return self._starts[-1] + self._turns[-1]

    def of_turn(self, turn: Index) -> Index:
        """Index of the sequence that a turn belongs to."""
        return sum((as_integer(turn >= start) for start in self._starts[1:]), start=jnp.int32(0))

    def sequence(self, index: Index) -> Index:
        """The index-th sequence."""
        return _at(self._sequences, index)

    def length(self, index: Index) -> Index:
        """Positions of the sequence before the new token, which may be more than the capacity."""
        return _at(self._lengths, index)

    def seen(self, index: Index) -> Index:
        """Positions that the cache holds."""
        return _at(self._seen, index)

    def start(self, index: Index) -> Index:
        """The first turn of the sequence."""
        return _at(self._starts, index)

    def turns(self, index: Index) -> Index:
        """Turns of the sequence."""
        return _at(self._turns, index)

    def first_position(self, index: Index, turn: Index) -> Index:
        """The first position of a turn's tile."""
        return (self._rank + (turn - self.start(index)) * self._plan.parts) * self._plan.positions

    def first_loaded(self, index: Index, turn: Index) -> Index:
        """The first of the positions that are loaded in a turn.

        A sequence's last tile begins earlier, where positions are that other turns count and have loaded: to read on
        behind the last position would read as many new bytes for nothing.
        """
        end = lax.div(self.seen(index) + ROWS - 1, ROWS) * ROWS
        return jnp.maximum(jnp.minimum(self.first_position(index, turn), end - self._plan.positions), 0)


def _at(values: Sequence[Index], index: Index) -> Index:
    """The value of an index."""
    pairs = enumerate(values[1:], start=1)
    return functools.reduce(lambda chosen, pair: jnp.where(index >= pair[0], pair[1], chosen), pairs, values[0])
