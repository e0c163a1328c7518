"""Heads as columns of a product, and the positions of the cache that no head of a prompt fills."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ROWS_PER_INSTRUCTION


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """The columns of the joined product: heads of queries, then of keys, then of values.

    Attributes:
      queries: heads of queries.
      keys: heads of keys, and as many of values.
      size: numbers of a head.
      capacity: positions of the cache.
      norm_eps: of the RMSNorm of each head of queries and keys; None if there is none.
    """

    queries: int
    keys: int
    size: int
    capacity: int
    norm_eps: float | None = None

    @property
    def half(self) -> int:
        """Columns of a chunk: the unit that a rotation pairs, at most 128 bytes wide."""
        return self.size // 2

    @property
    def columns(self) -> int:
        """Columns of the joined product."""
        return (self.queries + 2 * self.keys) * self.size

    def chunks(self, rows: int, columns: int) -> int:
        """Chunks of a tile: 64 rows of half a head each."""
        return rows // ROWS_PER_INSTRUCTION * (columns // self.half)

    def staging_slots(self, slots: int) -> int:
        """Slots for chunks of 16-bit numbers in the memory of `slots` of 128 bytes a row."""
        return slots * BYTES_PER_ROW // (2 * self.half)


def clear_cache_from(
    layout: HeadLayout, sequences: int, first: int, staging, caches: tuple[Any, Any], layer, rank, consumers: int
) -> None:
    """Writes zeros to the caches' layer from position `first` on; all consumers of the kernel share it.

    The stores are under the products that follow.

    Args:
      layout: of the heads.
      sequences: of the caches.
      first: the first position beyond all tiles.
      staging: [slots, 64, half] in shared memory; the first slot is in use until its stores have been waited for.
      caches: keys and values in memory, [layers, sequences, heads, capacity, size].
      layer: of the caches.
      rank: of this warpgroup among all consumers of the kernel.
      consumers: how many there are.
    """
    position_chunks = -(-(layout.capacity - first) // ROWS_PER_INSTRUCTION)
    if position_chunks <= 0:
        return
    zeros = jnp.zeros(staging.shape[1:], staging.dtype)
    staging[0] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    chunks = sequences * layout.keys * position_chunks * 2

    @pl.loop(0, lax.div(chunks - rank + consumers - 1, consumers))
    def _(iteration):
        coordinates = []
        index = rank + iteration * consumers
        for size in (2, position_chunks, layout.keys):
            coordinates.append(lax.rem(index, size))
            index = lax.div(index, size)
        half, position_chunk, head = coordinates
        positions = pl.ds(first + position_chunk * ROWS_PER_INSTRUCTION, ROWS_PER_INSTRUCTION)
        for cache in caches:
            zeroed = cache.at[layer, index, head, positions, pl.ds(half * layout.half, layout.half)]
            plgpu.copy_smem_to_gmem(staging.at[0], zeroed)
