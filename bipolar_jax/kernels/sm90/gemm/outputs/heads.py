"""Queries, keys and values of prompts on their way to memory: a tile of the joined product, half a head at a time.

A head's columns are in one tile. What a rotation puts together, the columns d and d + head_dim / 2 of a row, are
numbers of the same thread in two pieces of the accumulator, so it takes no exchange. Their cosines and sines arrive in
the slots of shared memory that both halves leave by, as a residual does (`output_pieces`), under the mainloop. Keys and
values leave twice from the same shared memory, to where the prompt's attention reads them and to the cache.
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

from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout, HeadTargets
from bipolar_jax.kernels.sm90.gemm.outputs.rope_tables import rotated


@dataclasses.dataclass(frozen=True)
class HeadPieces:
    """Of one consumer's tile.

    Attributes:
      layout: what columns are.
      tile_m, tile_n: of the tile; heads begin at its first column and end at its last.
      staging: [pieces of the tile, 64, half] in shared memory.
      targets: where heads go.
      origin: sequence, first position in it, first column.
      length: positions of a prompt, if tiles have rows beyond them, else None.
      arrived: barriers, one a slot, of cosines and sines.
    """

    layout: HeadLayout
    tile_m: int
    tile_n: int
    staging: Any
    targets: HeadTargets
    origin: tuple[Any, Any, Any]
    length: int | None
    arrived: Any

    @property
    def width(self) -> int:
        """Columns to finish at once."""
        return self.layout.half

    @property
    def rows_at_once(self) -> int:
        """Rows to finish at once: two halves of a head, a cosine and a sine of each pair are in registers."""
        return ROWS_PER_INSTRUCTION

    def _origins(self) -> list[tuple[int, int]]:
        """First rows and columns of the tile's heads, 64 rows of each, in order."""
        rows = range(0, self.tile_m, ROWS_PER_INSTRUCTION)
        return list(itertools.product(rows, range(0, self.tile_n, self.layout.size)))

    def _head(self, number: int):
        """Which head the number-th is, and whether it is rotated, as queries and keys are."""
        _, first = self._origins()[number]
        head = lax.div(self.origin[2] + first, self.layout.size)
        return head, head < self.layout.queries + self.layout.keys

    def start(self) -> None:
        """Before the mainloop: has cosines and sines of heads that are rotated loaded to the slots of their halves."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number, (row, _) in enumerate(self._origins()):
            _, rotates = self._head(number)

            @pl.when(rotates)
            def _(number=number, row=row):
                for part, table in enumerate(self.targets.tables):
                    slot = self._slot(number, part)
                    rows = table.at[pl.ds(self.origin[1] + row, ROWS_PER_INSTRUCTION)]
                    plgpu.copy_gmem_to_smem(rows, self.staging.at[slot], self.arrived[slot])

    def _slot(self, number: int, part: int) -> int:
        """Of one half of a head: every piece of a tile has its own."""
        return 2 * number + part

    def store(self, finished: Callable[[int, int], Float[Array, "64 half"]]) -> None:
        """Rotates and sends all heads of the tile.

        Args:
          finished: float32 numbers of the product, from the row and column of the tile where they begin.
        """
        half_columns = self.layout.half
        if self.targets.tables is None:
            # What the tile before left in the slots must have been read; `start` has waited for that elsewhere.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number, (row, first) in enumerate(self._origins()):
            head, rotates = self._head(number)
            halves = [finished(row, first), finished(row, first + half_columns)]
            if self.length is not None:
                halves = [self._only_prompt(half, self.origin[1] + row) for half in halves]
            if self.targets.tables is None:
                self._send(number, head, halves)
                continue

            @pl.when(rotates)
            def _(number=number, head=head, halves=halves):
                self._send(number, head, rotated(halves, self._tables(number)), of_values=False)

            @pl.when(jnp.logical_not(rotates))
            def _(number=number, head=head, halves=halves):
                self._send(number, head, halves, of_values=True)

    def _tables(self, number: int) -> list[Float[Array, "64 half"]]:
        """Cosines and sines of a head's rows, once they have come."""
        slots = [self._slot(number, part) for part in (0, 1)]
        for slot in slots:
            plgpu.barrier_wait(self.arrived[slot])
        # Every thread loads what lies where it will store: nobody waits for anybody.
        return [plgpu.load(self.staging.at[slot], layout=plgpu.Layout.WGMMA) for slot in slots]

    def _only_prompt(self, half: Float[Array, "64 half"], position) -> Float[Array, "64 half"]:
        """Zeros beyond the prompt, where the cache wants them."""
        row = plgpu.broadcasted_iota(jnp.int32, half.shape, 0, layout=plgpu.Layout.WGMMA)
        return jnp.where(row + position < self.length, half, 0.0)

    def _send(self, number: int, head, halves: list, of_values: bool | None = None) -> None:
        """Sends both halves of the number-th head; of_values says which of the targets there can be, None all."""
        row, _ = self._origins()[number]
        for part, half in enumerate(halves):
            slot = self._slot(number, part)
            self.staging[slot] = half.astype(self.staging.dtype)
            plgpu.commit_smem()
            self._copy(self.staging.at[slot], row, head, part * self.layout.half, of_values)
            # One group a piece, whether it goes to one place or to two.
            plgpu.commit_smem_to_gmem_group()

    def _copy(self, piece, row: int, head, first: int, of_values: bool | None) -> None:
        """Has a piece copied to where it belongs: `first` is its first column in the head."""
        layout, targets = self.layout, self.targets
        sequence, position, _ = self.origin
        positions, columns = pl.ds(position + row, ROWS_PER_INSTRUCTION), pl.ds(first, layout.half)

        def to_heads(out, head):
            begin = head * layout.size + first
            plgpu.copy_smem_to_gmem(piece, out.at[sequence, positions, pl.ds(begin, layout.half)], commit_group=False)

        def to_cache(cache, head):
            at = cache.at[targets.layer, sequence, head, positions, columns]
            plgpu.copy_smem_to_gmem(piece, at, commit_group=False)

        key, value = head - layout.queries, head - layout.queries - layout.keys
        if of_values is not True:

            @pl.when(key < 0)
            def _():
                to_heads(targets.q, head)

            @pl.when((key >= 0) & (value < 0))
            def _():
                to_heads(targets.k, key)
                to_cache(targets.keys, key)

        if of_values is not False:

            @pl.when(value >= 0)
            def _():
                # Beyond the last head nothing is written, but is counted among what has to be waited for.
                to_heads(targets.v, value)

            @pl.when((value >= 0) & (value < layout.keys))
            def _():
                to_cache(targets.values, value)
