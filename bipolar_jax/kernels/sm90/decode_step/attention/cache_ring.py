"""The cache ring: loads chunks of a head's keys and values to shared memory, divided over blocks and warpgroups."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.kernels.sm90.core.branches import as_integer, when
from bipolar_jax.kernels.sm90.core.emulation import is_interpreted
from bipolar_jax.kernels.sm90.core.fragments import ALONG_ROWS, MATRIX, pinned
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import (
    CHUNK_POSITIONS,
    WARPGROUPS,
    Layers,
    LayersShape,
)
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import CACHE_LINE, prefetch_lines

COLUMNS = 64  # elements of 16 bits that the widest swizzle takes
KEYS, VALUES = 0, 1
_LOADED_ZEROS = 128  # of which a chunk uses the first 64: Mosaic copies 128 bytes at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What new tokens attend to: arrays, or refs in global memory.

    Attributes:
      keys, values: 16-bit floats [layers, texts, kv_heads, capacity, head_dim]; or codes as `models.kv_cache` stores
        them, uint8 [..., head_dim] for 8 bits, [..., head_dim / 2] for 4.
      length: positions that hold a token, int32 [texts].
      cos, sin: of the new tokens' positions, float32 [texts * 128]: each half twice, the first half of the sines
        negative; of shorter heads all of it several times.
      slopes: ALiBi's, float32 [heads], for scores in base 2; or None.
      key_grids, value_grids: of codes: scales, float32, and zeros, uint8 [layers, texts, kv_heads, capacity]; else
        empty.
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
    """Shared memory for `chunks_at_once` chunks of keys and values.

    Attributes:
      vectors: floats, in tiles of 64 elements; or codes, undivided.
      grids: of codes: scales and zeros; else empty.
    """

    vectors: Any
    grids: tuple = ()


def cache_slot_types(shape: LayersShape, dtype: jnp.dtype) -> CacheSlots:
    """Scratch specifications."""
    slots, row_bytes = (shape.cache_slots, shape.chunks_at_once), shape.cache_row_bytes
    if shape.cache_bits is None:
        tiles, width = (*slots, shape.head_dim // COLUMNS, CHUNK_POSITIONS, COLUMNS), 2 * COLUMNS
        return CacheSlots(plgpu.SMEM(tiles, dtype, transforms=(plgpu.SwizzleTransform(width),)))
    tiles = (*slots, 1, CHUNK_POSITIONS, row_bytes)
    return CacheSlots(
        plgpu.SMEM(tiles, dtype, transforms=(plgpu.SwizzleTransform(row_bytes),)),
        (plgpu.SMEM((*slots, CHUNK_POSITIONS), jnp.float32), plgpu.SMEM((*slots, _LOADED_ZEROS), jnp.uint8)),
    )


def copies_of_chunk(shape: LayersShape) -> int:
    """TMA copies for a chunk's keys, or for its values: of each tile; or of codes, scales and zeros."""
    return shape.head_dim // COLUMNS if shape.cache_bits is None else 3


class HeadAssignment(NamedTuple):
    """A warpgroup's share of attention, or the block's.

    Attributes:
      unit: index among the heads of all texts, by text; of a block that attends for several, the first.
      text: whose head it attends for; not traced if there is one.
      head: that it attends for.
      split: its index among the blocks of the head.
      active: whether there is such a head.
      partial: index of the partial attention that it writes.
      first: first of the elements of its block's heads that the block combines, see `LayersShape.combined`.
      combines: whether there are such elements.
    """

    unit: Int[Array, ""]
    text: Int[Array, ""] | int
    head: Int[Array, ""]
    split: Int[Array, ""]
    active: Bool[Array, ""]
    partial: Int[Array, ""]
    first: Int[Array, ""]
    combines: Bool[Array, ""]


def assign_head(shape: LayersShape, block: Int[Array, ""], warpgroup: Int[Array, ""] | int = 0) -> HeadAssignment:
    team, split = lax.div(block, shape.splits), lax.rem(block, shape.splits)
    unit = team if shape.heads_at_once == 1 else team * shape.heads_at_once + warpgroup
    active, first, text, head = unit < shape.units, split * shape.combined, 0, unit
    if shape.texts > 1:
        text = jnp.minimum(lax.div(unit, shape.heads), shape.texts - 1)
        head = unit - text * shape.heads
    partial, combines = unit * shape.splits + split, active & (first < shape.heads_at_once * shape.head_dim)
    return HeadAssignment(unit, text, head, split, active, partial, first, combines)


class ChunkIndex(NamedTuple):
    """A chunk of a warpgroup; layers are counted from the first that is computed."""

    layer: Int[Array, ""] | int
    chunk: Int[Array, ""] | int


class CacheRing:
    """A warpgroup's chunks of 64 positions of its head's keys and values, over all layers.

    There is one slot for keys and one for values, or one for both in turn. Warpgroups that share their chunks wait for
    the same loads, which the last one starts when all have emptied the slot.
    """

    def __init__(
        self,
        shape: LayersShape,
        cache: Cache,
        layers: Layers,
        warpgroup,
        block,
        slots: CacheSlots,
        arrived,
        emptied=None,
    ):
        """Starts the first loads.

        Args:
          arrived: barriers [2 chunks_at_once], one arrival for each copy of a chunk.
          emptied: barriers [2], one arrival for each warpgroup, where warpgroups share chunks; else None.
        """
        self._shape, self._cache, self._slots, self._arrived = shape, cache, slots, arrived
        self._emptied = emptied
        self._separate_slots = shape.cache_slots == 2
        self._layers = layers
        self.length = cache.length[assign_head(shape, block).text]
        self.assign(warpgroup, block)
        first = ChunkIndex(0, 0)
        self._load(KEYS, first)
        if self._separate_slots:
            self._load(VALUES, first)

    def assign(self, warpgroup, block) -> None:
        """Computes which chunks are this warpgroup's. Called in every layer: keeping the results costs registers."""
        shape, self._warpgroup = self._shape, warpgroup
        at_once = shape.chunks_at_once
        self._lane = 0 if at_once == 1 else warpgroup
        assigned = assign_head(shape, block, warpgroup)
        self.text, self.head, split, self.active, self.partial = assigned[1:6]
        self.kv_head = lax.div(jnp.minimum(self.head, shape.heads - 1), shape.heads // shape.kv_heads)
        chunks = lax.div(self.length + (CHUNK_POSITIONS - 1), CHUNK_POSITIONS)
        self._first = lax.div(chunks * split, shape.splits) + self._lane
        end = lax.div(chunks * (split + 1), shape.splits)
        count = lax.div(jnp.maximum(end - self._first + (at_once - 1), 0), at_once)
        self.chunks = jnp.where(self.active, count, 0)
        self.has_new = self.active & (split == shape.splits - 1)

    def prefetch(self, layer: Int[Array, ""], warpgroup, block) -> None:
        """Prefetches the layer's chunks behind the first, which has a slot already, to the L2 cache."""
        self.assign(warpgroup, block)
        skipped, turn = (1 + warpgroup, WARPGROUPS) if self._shape.heads_at_once > 1 else (1, 1)
        cache_layer = self._shape.first_layer + self._layers.first + layer
        row_bytes = self._shape.cache_row_bytes

        def prefetch_chunk(i, carry):
            first = self.position(skipped + i * turn)
            rows = jnp.minimum(self.length - first, CHUNK_POSITIONS)
            for source in (self._cache.keys, self._cache.values):
                chunk = source.at[cache_layer, self.text, self.kv_head, pl.ds(first, CHUNK_POSITIONS)]
                prefetch_lines(chunk, lax.div(rows * row_bytes + (CACHE_LINE - 1), CACHE_LINE))
            return carry

        lax.fori_loop(0, lax.div(jnp.maximum(self.chunks - skipped + (turn - 1), 0), turn), prefetch_chunk, ())

    def load_index(self, layer, chunk) -> ChunkIndex:
        """Which chunk `refill` is called for."""
        return ChunkIndex(layer, chunk)

    def position(self, chunk):
        """Of a chunk's first row."""
        return (self._first + chunk * self._shape.chunks_at_once) * CHUNK_POSITIONS

    def wait(self, kind: int) -> None:
        """Waits for a chunk of KEYS or of VALUES."""
        plgpu.barrier_wait(self._arrived_barrier(kind))

    def read(self, kind: int) -> list[Float[Array, "64 64"]]:
        """The tiles of every vector."""
        count = self._shape.head_dim // COLUMNS
        return [plgpu.load(self.tiles(kind)[tile], layout=MATRIX) for tile in range(count)]

    def tiles(self, kind: int) -> list:
        """Refs of the tiles of every vector."""
        slot = self._slot(self._slots.vectors, kind, self._pinned_lane())
        return [slot.at[tile] for tile in range(slot.shape[0])]

    def codes(self, kind: int):
        """Ref of the codes of every vector."""
        return self._slot(self._slots.vectors, kind, self._pinned_lane()).at[0]

    def grid(self, kind: int) -> tuple[Float[Array, "64"], Float[Array, "64"]]:
        """Of codes: steps (twice the scale) and signed zeros, in the layout ALONG_ROWS."""
        lane = self._pinned_lane()
        scale, zero = (
            plgpu.load(self._slot(ref, kind, lane).at[pl.ds(0, CHUNK_POSITIONS)], layout=ALONG_ROWS, optimized=False)
            for ref in self._slots.grids
        )
        return 2.0 * scale, zero.astype(jnp.float32) - float(1 << (self._shape.cache_bits - 1))

    def refill(self, kind: int, index: ChunkIndex) -> None:
        """Starts the next load into the slot of a chunk's keys or values, which the warpgroup has read."""
        # No division by the number of chunks, which would take some fifty instructions between keys and values.
        is_last = index.chunk + 1 == self.chunks
        following = ChunkIndex(index.layer + as_integer(is_last), jnp.where(is_last, 0, index.chunk + 1))
        if self._emptied is not None:
            if is_interpreted():  # whose race detector sees no order between these reads and a copy that waits for them
                plgpu.commit_smem()
            plgpu.barrier_arrive(self._emptied.at[kind])

            @when(self._warpgroup == WARPGROUPS - 1)
            def _():
                plgpu.barrier_wait(self._emptied.at[kind])
                synchronize(lanes_apart=True)  # the copies begin with a barrier of whole warps

            self._load(kind, following)
            return
        synchronize()
        if self._separate_slots:
            self._load(kind, following)
        else:
            self._load(1 - kind, index if kind == KEYS else following)

    def _slot(self, ref, kind: int, lane):
        return ref.at[kind if self._separate_slots else 0, lane]

    def _pinned_lane(self):
        return self._lane if self._shape.chunks_at_once == 1 else pinned(self._lane)

    def _arrived_barrier(self, kind: int):
        return self._arrived.at[kind * self._shape.chunks_at_once + self._lane]

    def _load(self, kind: int, index: ChunkIndex) -> None:
        loads = (index.layer < self._layers.count) & (self.chunks > 0)
        if self._emptied is not None:
            loads &= self._warpgroup == WARPGROUPS - 1

        @when(loads)
        def _():
            layer = self._shape.first_layer + self._layers.first + index.layer
            source = (self._cache.keys, self._cache.values)[kind]
            slot = self._slot(self._slots.vectors, kind, self._lane)
            first, arrived = self.position(index.chunk), self._arrived_barrier(kind)
            tiles, _, columns = slot.shape
            for tile in range(tiles):
                # [64 positions, 64 elements], or the codes of whole vectors
                rows, own_columns = pl.ds(first, CHUNK_POSITIONS), pl.ds(tile * columns, columns)
                block = source.at[layer, self.text, self.kv_head, rows, own_columns]
                plgpu.copy_gmem_to_smem(block, slot.at[tile], arrived)
            grids = (self._cache.key_grids, self._cache.value_grids)[kind]
            for grid, slots in zip(grids, self._slots.grids, strict=True):
                # [64 positions] of scales, [128] of zeros
                slot = self._slot(slots, kind, self._lane)
                block = grid.at[layer, self.text, self.kv_head, pl.ds(first, slot.shape[0])]
                plgpu.copy_gmem_to_smem(block, slot, arrived)
