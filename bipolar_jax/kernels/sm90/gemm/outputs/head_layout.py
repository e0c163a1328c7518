"""Heads as columns of a product, where they go, and what of the caches no head fills."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ROWS_PER_INSTRUCTION


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """What the columns of the joined product are: heads of queries, then of keys, then of values.

    Attributes:
      queries: heads.
      keys: heads, and as many of values.
      size: numbers of a head.
      capacity: positions of the cache.
    """

    queries: int
    keys: int
    size: int
    capacity: int

    @property
    def half(self) -> int:
        """Columns of a piece: what is rotated, at most 128 bytes."""
        return self.size // 2

    @property
    def columns(self) -> int:
        return (self.queries + 2 * self.keys) * self.size

    def pieces(self, rows: int, columns: int) -> int:
        """Halves of heads, 64 rows of each, in a tile."""
        return rows // ROWS_PER_INSTRUCTION * (columns // self.half)

    def staging_slots(self, whole: int) -> int:
        """Slots for pieces in the memory of so many of 128 bytes a row; numbers have 16 bits."""
        return whole * BYTES_PER_ROW // (2 * self.half)


class HeadTargets(NamedTuple):
    """Where heads go, and what rotates them; refs in memory.

    Attributes:
      q, k, v: [sequences, length, heads * size].
      layer: number of the caches' layer.
      tables: cosines and sines, see `rotation`, [covered rows, half] each, of the outputs' dtype by name; or None.
      keys, values: caches, [layers, sequences, heads, capacity, size].
    """

    q: Any
    k: Any
    v: Any
    layer: Any
    tables: tuple[Any, Any] | None
    keys: Any
    values: Any


def clear_rest(layout: HeadLayout, sequences: int, first: int, staging, targets: HeadTargets, worker, workers: int):
    """Zeros in the caches' layer from position `first` on, by all workers together, under the products.

    Args:
      layout: of heads.
      sequences: how many.
      first: position behind all tiles.
      staging: [slots, 64, half] in shared memory; its first slot is in use until it is waited for.
      targets: whose caches they are.
      worker: the number of this warpgroup.
      workers: how many there are.
    """
    runs = -(-(layout.capacity - first) // ROWS_PER_INSTRUCTION)
    if runs <= 0:
        return
    zeros = jnp.zeros(staging.shape[1:], staging.dtype)
    staging[0] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    pieces = sequences * layout.keys * runs * 2

    @pl.loop(0, lax.div(pieces - worker + workers - 1, workers))
    def _(turn):
        at = []
        index = worker + turn * workers
        for size in (2, runs, layout.keys):
            at.append(lax.rem(index, size))
            index = lax.div(index, size)
        part, run, head = at
        positions = pl.ds(first + run * ROWS_PER_INSTRUCTION, ROWS_PER_INSTRUCTION)
        for cache in (targets.keys, targets.values):
            to = cache.at[targets.layer, index, head, positions, pl.ds(part * layout.half, layout.half)]
            plgpu.copy_smem_to_gmem(staging.at[0], to)
