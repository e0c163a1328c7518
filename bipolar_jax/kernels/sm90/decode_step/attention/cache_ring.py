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

from bipolar_jax.kernels.sm90.core.fragments import ALONG_ROWS, MATRIX, pinned
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.decode_step.config import HEAD_DIM, POSITIONS, WARPGROUPS, LayersShape

HALF = HEAD_DIM // 2
_LOADED_ZEROS = 128  # of which a chunk has the first 64: Mosaic copies 128 bytes at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Refs of what is attended to.

    Attributes:
      keys, values: [layers, 1, kv_heads, capacity, HEAD_DIM] of 16-bit floats; or codes as `models.quantized_heads` has
        them, uint8 [..., HEAD_DIM] of 8 bits, [..., HEAD_DIM / 2] of 4.
      length: positions that hold a token, int32 [1].
      cos, sin: of the new token's position, float32 [HEAD_DIM]: each twice, the sines negative at first.
      slopes: ALiBi's, float32 [heads], for scores in base 2; or None.
      key_grids, value_grids: of codes, scales and zeros, float32 and uint8 [layers, 1, kv_heads, capacity]; else empty.
    """

    keys: Any
    values: Any
    length: Any
    cos: Any
    sin: Any
    slopes: Any = None
    key_grids: tuple = ()
    value_grids: tuple = ()


class CacheSlots(NamedTuple):
    """Room in shared memory for chunks of keys and values, of every warpgroup.

    Attributes:
      numbers: floats, in halves of 64 numbers; or codes, as one part.
      grids: of codes, scales and zeros; else empty.
    """

    numbers: Any
    grids: tuple = ()


def slots_of_cache(shape: LayersShape, dtype: jnp.dtype) -> CacheSlots:
    """What to allocate."""
    slots, row_bytes = (shape.cache_slots, WARPGROUPS), shape.cache_row_bytes
    if shape.cache_bits is None:
        tiles, width = (*slots, 2, POSITIONS, HALF), row_bytes // 2
        return CacheSlots(plgpu.SMEM(tiles, dtype, transforms=(plgpu.SwizzleTransform(width),)))
    tiles = (*slots, 1, POSITIONS, row_bytes)
    return CacheSlots(
        plgpu.SMEM(tiles, dtype, transforms=(plgpu.SwizzleTransform(row_bytes),)),
        (plgpu.SMEM((*slots, POSITIONS), jnp.float32), plgpu.SMEM((*slots, _LOADED_ZEROS), jnp.uint8)),
    )


def copies_of_chunk(shape: LayersShape) -> int:
    """Of a chunk's keys, or of its values: both halves, or codes, scales and zeros."""
    return 2 if shape.cache_bits is None else 3


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

    def __init__(self, shape: LayersShape, cache: Cache, layers: range, me, block, slots: CacheSlots, arrived):
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
        slot = self._at(self._slots.numbers, kind, pinned(self._me))
        return [slot.at[half] for half in range(2)]

    def codes(self, kind: int, *, emulate: bool):
        """Ref of the codes of every vector."""
        return self._at(self._slots.numbers, kind, pinned(self._me)).at[0]

    def grid(self, kind: int, *, emulate: bool) -> tuple[Float[Array, "64"], Float[Array, "64"]]:
        """Of codes: steps, twice the scale, and signed zeros, in the layout ALONG_ROWS."""
        me = pinned(self._me)
        scale, zero = (
            plgpu.load(self._at(ref, kind, me).at[pl.ds(0, POSITIONS)], layout=ALONG_ROWS, optimized=False)
            for ref in self._slots.grids
        )
        return 2.0 * scale, zero.astype(jnp.float32) - float(1 << (self._shape.cache_bits - 1))

    def refill(self, kind: int, number, *, emulate: bool) -> None:
        """Loads what comes next into the slot of the number-th chunk's keys or values, which have been read."""
        synchronize()
        if self._slots_apart:
            self._load(kind, number + 1)
        else:
            self._load(1 - kind, number + kind)

    def _at(self, ref, kind: int, warpgroup):
        return ref.at[kind if self._slots_apart else 0, warpgroup]

    def _load(self, kind: int, number) -> None:
        @pl.when(number < self._layers * self.chunks)
        def _():
            layer = self._first_layer + lax.div(number, jnp.maximum(self.chunks, 1))
            chunk = lax.rem(number, jnp.maximum(self.chunks, 1))
            source = (self._cache.keys, self._cache.values)[kind]
            target = self._at(self._slots.numbers, kind, self._me)
            first, arrived = self.position(chunk), self._arrived.at[kind * WARPGROUPS + self._me]
            parts, _, columns = target.shape
            for part in range(parts):
                # [64 positions, 64 numbers], or the bytes of all
                rows = source.at[layer, 0, self.kv_head, pl.ds(first, POSITIONS), pl.ds(part * columns, columns)]
                plgpu.copy_gmem_to_smem(rows, target.at[part], arrived)
            grids = (self._cache.key_grids, self._cache.value_grids)[kind]
            for numbers, slots in zip(grids, self._slots.grids, strict=True):
                # [64 positions] of scales, [128] of zeros
                slot = self._at(slots, kind, self._me)
                rows = numbers.at[layer, 0, self.kv_head, pl.ds(first, slot.shape[0])]
                plgpu.copy_gmem_to_smem(rows, slot, arrived)
