"""A tile of the output on its way to memory, piece by piece, each 64 rows of up to 128 bytes; and what is added to it.

Pieces pass through a few slots of shared memory in turn. A residual arrives in the same slots: those of the first
pieces under the mainloop, each other one while the piece between is finished. A thread adds to its own numbers, where
they lie.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

_ROOMY_TILE = 128 * 128  # up to here a consumer has as many registers for its epilogue as for the accumulator


@dataclasses.dataclass(frozen=True)
class OutputPieces:
    """Of one consumer's tile.

    Attributes:
      tile_m, tile_n: of the tile.
      parts: columns of the product that make one of it.
      staging: [slots, 64, width] in shared memory.
      out: [tile_m, tile_n] in memory.
      residual: likewise, or None.
      arrived: barriers, one a slot, of a residual.
    """

    tile_m: int
    tile_n: int
    parts: int
    staging: Any
    out: Any
    residual: Any = None
    arrived: Any = None

    @property
    def _height(self) -> int:
        return self.staging.shape[1]

    @property
    def width(self) -> int:
        """Columns of a piece."""
        return self.staging.shape[2]

    @property
    def rows_at_once(self) -> int:
        """Rows to finish at once: all read the columns' terms once, but need registers for all their numbers."""
        return self.tile_m if self.parts * self.tile_m * self.tile_n <= _ROOMY_TILE // self.parts else self._height

    def _groups(self) -> list[tuple[int, int]]:
        """First rows and columns of what is finished at once, in order."""
        return list(itertools.product(range(0, self.tile_m, self.rows_at_once), range(0, self.tile_n, self.width)))

    def _origins(self) -> list[tuple[int, int]]:
        """Of all pieces, in order."""
        inner = range(0, self.rows_at_once, self._height)
        return [(row + offset, column) for row, column in self._groups() for offset in inner]

    def start(self) -> None:
        """Before the mainloop: has the residual of the first pieces loaded."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(min(self.staging.shape[0], len(self._origins()))):
            self._load(number)

    def store(self, finished: Callable[[int, int], Float[Array, "rows_at_once width"]]) -> None:
        """Sends all of the tile.

        Args:
          finished: numbers of the output, from the row and column of the tile where they begin.
        """
        for group, (row, column) in enumerate(self._groups()):
            self._send(group, finished(row, column))

    def _send(self, group: int, finished: Float[Array, "rows_at_once width"]) -> None:
        """Sends what was finished at once, the group-th."""
        slots, origins = self.staging.shape[0], self._origins()
        inner = self.rows_at_once // self._height
        # Small pieces, each on its way before the next is made: larger ones were measured to be slower.
        for i in range(inner):
            number = group * inner + i
            slot = number % slots
            piece = lax.slice(finished, (i * self._height, 0), ((i + 1) * self._height, self.width))
            # What was in this slot must have been read: by the tile before, which may have ended in any
            # slot, or by the piece that had it `slots` pieces ago. A residual there came after that.
            if self.residual is not None:
                plgpu.barrier_wait(self.arrived[slot])
                residual = plgpu.load(self.staging.at[slot], layout=plgpu.Layout.WGMMA)
                piece = (piece.astype(jnp.float32) + residual.astype(jnp.float32)).astype(piece.dtype)
            elif number == 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            elif number >= slots:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            self.staging[slot] = piece
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.staging.at[slot], self._part(self.out, number))
            # The slot of the piece before this one, which has been read about now, if there are two.
            lag = min(1, slots - 1)
            if self.residual is not None and number >= lag and number - lag + slots < len(origins):
                plgpu.wait_smem_to_gmem(lag, wait_read_only=True)
                self._load(number - lag + slots)

    def _load(self, number: int) -> None:
        """Has a piece of the residual loaded to its slot."""
        slot = number % self.staging.shape[0]
        plgpu.copy_gmem_to_smem(self._part(self.residual, number), self.staging.at[slot], self.arrived[slot])

    def _part(self, tile, number: int):
        row, column = self._origins()[number]
        return tile.at[pl.ds(row, self._height), pl.ds(column, self.width)]
