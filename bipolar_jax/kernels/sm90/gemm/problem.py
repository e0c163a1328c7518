"""The static side of one product: sizes, order of tiles, who does which."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ELEMENTS_PER_ROW
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.gemm.outputs.sign_threads import SignThreads


@dataclasses.dataclass(frozen=True)
class Work:
    """What the warpgroups of a kernel agree on.

    Attributes:
      m: rows of the output, of each sequence if there are several.
      n: its columns.
      recovery: how planes make products.
      tiling: shape of the work of a block.
      dtype: of the output.
      max_clusters: clusters of blocks that the device holds at a time.
      group_size: elements of K that share a scale, or None.
      activation: function of the product, or None.
      emulate: whether this is interpret mode.
      sequences: runs of m rows that share no tile.
      heads: what the columns are where the output is queries, keys and values of prompts, or None.
      as_signs: whether the output leaves as signs of 16-bit numbers, see `sign_pieces`.
    """

    m: int
    n: int
    recovery: Recovery
    tiling: Tiling
    dtype: jnp.dtype
    max_clusters: int
    group_size: int | None
    activation: Activation | None
    emulate: bool
    sequences: int = 1
    heads: HeadLayout | None = None
    as_signs: bool = False

    @property
    def groups_per_step(self) -> int:
        """Scales that belong to one 128-byte row of K."""
        return 1 if self.group_size is None else max(1, BYTES_PER_ROW // self.group_size)

    @property
    def steps_per_group(self) -> int:
        """128-byte rows of K that share a scale; 1 where several groups share a row."""
        return 1 if self.group_size is None else max(1, self.group_size // BYTES_PER_ROW)

    @property
    def groups_per_turn(self) -> int:
        """Groups that are multiplied without a break, in whole steps: as many as leave enough registers."""
        return 4 if self.group_size in (32, 128) else 2

    @property
    def turns(self) -> int:
        """Turns over all groups of K."""
        elements = BYTES_PER_ROW // self.groups_per_step * self.steps_per_group * self.groups_per_turn
        return -(-self.recovery.k // elements)

    @property
    def k_blocks(self) -> int:
        """Steps of one pass over K; of groups in whole turns, which the loads fill up with zeros."""
        if self.group_size is None:
            return -(-self.recovery.k // ELEMENTS_PER_ROW[self.recovery.kind])
        return self.turns * self.groups_per_turn * self.steps_per_group // self.groups_per_step

    @property
    def steps_per_tile(self) -> int:
        return self.k_blocks * self.recovery.num_pairs

    @property
    def parts(self) -> int:
        """Columns of the product that make one of the output: 2 if gated, `n` apart."""
        return 1 if self.activation is None else self.activation.parts

    @property
    def out_tile_n(self) -> int:
        """Columns of the output that a consumer's tile of the product makes."""
        return self.tiling.tile_n // self.parts

    @property
    def out_block_n(self) -> int:
        """Likewise of a block's tile."""
        return self.tiling.block_n // self.parts

    @property
    def sign_threads(self) -> SignThreads:
        """What threads do with a tile that leaves as signs."""
        return SignThreads(jnp.dtype(self.dtype).name, self.m, self.n, self.out_tile_n)

    def loaded_columns(self, n_start) -> list[tuple]:
        """A block's columns of the product that lie side by side: (part, first of it, first in the tile, how many).

        A gated tile of a consumer is as many gates, and then what they belong to.
        """
        if self.parts == 1:
            return [(0, n_start, 0, self.tiling.block_n)]
        return [
            (part, n_start + first // self.parts, first + part * self.out_tile_n, self.out_tile_n)
            for first in range(0, self.tiling.block_n, self.tiling.tile_n)
            for part in range(self.parts)
        ]

    @property
    def _row_tiles(self) -> int:
        """Output tiles along the m rows of a sequence, in units of what a cluster does together."""
        return -(-self.m // (self.tiling.block_m * self.tiling.cluster_m))

    @property
    def covered_rows(self) -> int:
        """Rows of a sequence's tiles: m, and what the last ones have beyond."""
        return self._row_tiles * self.tiling.block_m * self.tiling.cluster_m

    @property
    def _tile_grid(self) -> tuple[int, int]:
        """Output tiles along all rows and along n, in the same units."""
        return self.sequences * self._row_tiles, -(-self.n // (self.out_block_n * self.tiling.cluster_n))

    @property
    def tiles(self) -> int:
        return self._tile_grid[0] * self._tile_grid[1]

    @property
    def clusters(self) -> int:
        return min(self.max_clusters, self.tiles)

    @property
    def tiles_at_a_time(self) -> int:
        """Tiles of a block that are in progress."""
        return self.tiling.consumers if self.tiling.schedule == "alternate" else 1

    @property
    def consumers_of_tile(self) -> int:
        return self.tiling.consumers // self.tiles_at_a_time

    def my_tiles(self):
        """How many tiles this cluster has: number cluster, cluster + clusters, ..."""
        return (self.tiles - lax.axis_index("cluster") + self.clusters - 1) // self.clusters

    def origin(self, index):
        """Sequence, first row in it, and first column of this block's part of the cluster's index-th tile."""
        tiling = self.tiling
        m_tile, n_tile = plgpu.planar_snake(
            lax.axis_index("cluster") + index * self.clusters,
            self._tile_grid,
            minor_dim=0 if tiling.band_axis == "m" else 1,
            tile_width=tiling.band,
        )
        sequence = 0
        if self.sequences > 1:
            sequence, m_tile = lax.div(m_tile, self._row_tiles), lax.rem(m_tile, self._row_tiles)
        return (
            sequence,
            (m_tile * tiling.cluster_m + lax.axis_index("cluster_m")) * tiling.block_m,
            (n_tile * tiling.cluster_n + lax.axis_index("cluster_n")) * self.out_block_n,
        )

    def consumer_of_all(self, me):
        """Number of this block's consumer `me` among those of all blocks, and how many these are."""
        tiling = self.tiling
        block = lax.axis_index("cluster")
        for name, size in (("cluster_m", tiling.cluster_m), ("cluster_n", tiling.cluster_n)):
            block = block * size + lax.axis_index(name)
        return block * tiling.consumers + me, self.clusters * tiling.cluster_size * tiling.consumers

    def next_slot(self, slot):
        return lax.select(slot + 1 == self.tiling.slots, 0, slot + 1)

    def buffer(self, index):
        """Which of the tiles in progress the index-th is."""
        return lax.rem(index, self.tiles_at_a_time)

    def full_barrier(self, index, slot):
        """Barriers count the phases that each waiter saw, so consumers of alternate tiles have their own."""
        return self.buffer(index) * self.tiling.slots + slot
