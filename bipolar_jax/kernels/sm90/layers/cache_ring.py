"""The cache's way through shared memory: a head's positions shared out over blocks and warpgroups, and their slots."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.kernels.sm90.layers.registers import MATRIX, pinned, synchronize
from bipolar_jax.kernels.sm90.layers.shape import HEAD_DIM, POSITIONS, WARPGROUPS, LayersShape

HALF = HEAD_DIM // 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Refs of what is attended to.

    Attributes:
      keys, values: [layers, 1, kv_heads, capacity, HEAD_DIM].
      length: positions that hold a token, int32 [1].
      cos, sin: of the new token's position, float32 [HEAD_DIM]: each twice, the sines negative at first.
      slopes: ALiBi's, float32 [heads], for scores in base 2; or None.
    """

    keys: Any
    values: Any
    length: Any
    cos: Any
    sin: Any
    slopes: Any = None


class Place(NamedTuple):
    """A block's, in attention.

    Attributes:
      head: that it works for.
      split: which of the blocks that share the head this is.
      takes_part: whether there is such a head.
      record: which partial attention it leaves.
      first: of the head's numbers that it joins, see `LayersShape.joined`.
      joins: whether there are any.
    """

    head: Int[Array, ""]
    split: Int[Array, ""]
    takes_part: Bool[Array, ""]
    record: Int[Array, ""]
    first: Int[Array, ""]
    joins: Bool[Array, ""]


def place_of(shape: LayersShape, block: Int[Array, ""]) -> Place:
    head, split = lax.div(block, shape.splits), lax.rem(block, shape.splits)
    takes_part, first = head < shape.heads, split * shape.joined
    return Place(head, split, takes_part, head * shape.splits + split, first, takes_part & (first < HEAD_DIM))


class CacheRing:
    """Chunks of 64 positions of a head's keys and values, of one warpgroup, over all layers.

    One slot of keys and one of values, or one for both in turn.
    """

    def __init__(self, shape: LayersShape, cache: Cache, layers: range, me, block, slots, arrived):
        self._shape, self._cache, self._slots, self._arrived = shape, cache, slots, arrived
        self._slots_apart = shape.cache_slots == 2
        self._layers, self._first_layer = len(layers), layers[0]
        self.length = cache.length[0]
        self.place(me, block)
        self._load(0, 0 * me)
        if self._slots_apart:
            self._load(1, 0 * me)

    def place(self, me, block) -> None:
        """Computes which chunks are this warpgroup's: anew in every layer, rather than to hold them in registers."""
        shape, self._me = self._shape, me
        place = place_of(shape, block)
        self.head, split, self.takes_part, self.record = place[:4]
        self.kv_head = lax.div(jnp.minimum(self.head, shape.heads - 1), shape.heads // shape.kv_heads)
        chunks = lax.div(self.length + (POSITIONS - 1), POSITIONS)
        self._first = lax.div(chunks * split, shape.splits) + me
        end = lax.div(chunks * (split + 1), shape.splits)
        mine = lax.div(jnp.maximum(end - self._first + (WARPGROUPS - 1), 0), WARPGROUPS)
        self.chunks = jnp.where(self.takes_part, mine, 0)
        self.has_new = self.takes_part & (split == shape.splits - 1)

    def number(self, layer, chunk):
        """The count of chunks before one."""
        return layer * self.chunks + chunk

    def position(self, chunk):
        """Of a chunk's first row."""
        return (self._first + chunk * WARPGROUPS) * POSITIONS

    def wait(self, kind: int) -> None:
        """Waits for a chunk of keys (0) or of values (1)."""
        plgpu.barrier_wait(self._arrived.at[kind * WARPGROUPS + self._me])

    def read(self, kind: int, half: int, *, emulate: bool) -> Float[Array, "64 64"]:
        """The lower or the upper half of every vector."""
        return plgpu.load(self.halves(kind, emulate=emulate)[half], layout=MATRIX)

    def halves(self, kind: int, *, emulate: bool) -> list:
        """Refs of the lower and the upper half of every vector."""
        slot = self._at(kind, pinned(self._me, emulate=emulate))
        return [slot.at[half] for half in range(2)]

    def refill(self, kind: int, number, *, emulate: bool) -> None:
        """Loads what comes next into the slot of the number-th chunk's keys or values, which have been read."""
        synchronize(emulate=emulate)
        if self._slots_apart:
            self._load(kind, number + 1)
        else:
            self._load(1 - kind, number + kind)

    def _at(self, kind: int, warpgroup):
        return self._slots.at[kind if self._slots_apart else 0, warpgroup]

    def _load(self, kind: int, number) -> None:
        @pl.when(number < self._layers * self.chunks)
        def _():
            layer = self._first_layer + lax.div(number, jnp.maximum(self.chunks, 1))
            chunk = lax.rem(number, jnp.maximum(self.chunks, 1))
            source = (self._cache.keys, self._cache.values)[kind]
            for half in range(2):
                # [64 positions, 64 numbers]
                plgpu.copy_gmem_to_smem(
                    source.at[layer, 0, self.kv_head, pl.ds(self.position(chunk), POSITIONS), pl.ds(half * HALF, HALF)],
                    self._at(kind, self._me).at[half],
                    self._arrived.at[kind * WARPGROUPS + self._me],
                )
