"""The static side of one product: its sizes, the order of its tiles, and which warpgroup does which."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery, Recovery
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ELEMENTS_PER_ROW
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS, Tiling


class TileOrigin(NamedTuple):
    """Where a tile of the output begins.

    Attributes:
      sequence: whose tokens its rows are; with splits of K, of which split its sums are.
      token: the first, counted within the sequence.
      column: the first column of the output.
    """

    sequence: Array | int
    token: Array
    column: Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product, as all warpgroups of its kernel see it.

    Attributes:
      m: tokens of each sequence.
      n: columns of the output.
      recovery: how products of planes, bytes or floats make the product of values.
      tiling: how blocks cut it up.
      blocks: persistent blocks at most, one a multiprocessor.
      group_size: elements of K that share a scale, or None.
      activation: applied to the product in float32 before any output sees it, or None.
      sequences: runs of m tokens that share no tile.
    """

    m: int
    n: int
    recovery: Recovery | FloatRecovery
    tiling: Tiling
    blocks: int = MULTIPROCESSORS
    group_size: int | None = None
    activation: Activation | None = None
    sequences: int = 1

    # Activations are the M operand of wgmma: the rows of the accumulator are tokens, its columns those of the output.
    token_axis: ClassVar[Literal[0, 1]] = 0

    def __post_init__(self):
        if self.splits > 1 and (self.sequences > 1 or self.group_size is not None or self.activation is not None):
            raise ValueError(f"{self.tiling} splits K: neither several sequences nor groups nor an activation fit")

    # Sizes along N. A column of a gated output is made of two columns of the product, `n` apart in w: gate and value.

    @property
    def factors(self) -> int:
        """Columns of the product that make one of the output: 2 if the activation is gated."""
        return 1 if self.activation is None else self.activation.parts

    @property
    def out_tile_n(self) -> int:
        """Columns of the output in a consumer's tile."""
        return self.tiling.tile_n // self.factors

    @property
    def out_block_n(self) -> int:
        """Columns of the output in a block's tile."""
        return self.tiling.block_n // self.factors

    # Sizes along K. A step is one stage of the ring buffer: 128 bytes of K of a pair of planes.

    @property
    def groups_per_step(self) -> int:
        """Groups that begin in one step; 1 where a group spans several."""
        return 1 if self.group_size is None else max(1, BYTES_PER_ROW // self.group_size)

    @property
    def steps_per_group(self) -> int:
        """Steps of one group; 1 where several groups share a step."""
        return 1 if self.group_size is None else max(1, self.group_size // BYTES_PER_ROW)

    @property
    def groups_per_iteration(self) -> int:
        """Groups that the mainloop unrolls, in whole steps: as many as leave enough registers."""
        return 4 if self.group_size in (32, 128) else 2

    @property
    def group_iterations(self) -> int:
        """Iterations of the mainloop over all groups of K."""
        elements = BYTES_PER_ROW // self.groups_per_step * self.steps_per_group * self.groups_per_iteration
        return -(-self.recovery.k // elements)

    @property
    def splits(self) -> int:
        """Parts of K whose sums are apart; the last may be shorter, and TMA fills it up with zeros."""
        return self.tiling.splits

    @property
    def steps_over_k(self) -> int:
        """Steps of one pass over a split of K; with groups in whole iterations, which TMA fills up with zeros."""
        if self.group_size is None:
            return -(-self.recovery.k // (ELEMENTS_PER_ROW[self.recovery.kind] * self.splits))
        return self.group_iterations * self.groups_per_iteration * self.steps_per_group // self.groups_per_step

    @property
    def steps_per_tile(self) -> int:
        """Steps of one tile: a pass over K for every pair of planes."""
        return self.steps_over_k * self.recovery.num_pairs

    # The grid of tiles, and who has which. A persistent cluster has tiles cluster, cluster + clusters, ...

    @property
    def _token_tiles(self) -> int:
        """Tiles along the tokens of a sequence, in units of a cluster's."""
        return -(-self.m // (self.tiling.block_m * self.tiling.cluster_m))

    @property
    def covered_tokens(self) -> int:
        """Tokens of a sequence's tiles: m, rounded up to whole tiles of a cluster."""
        return self._token_tiles * self.tiling.block_m * self.tiling.cluster_m

    @property
    def _tile_grid(self) -> tuple[int, int]:
        """Tiles along all tokens and along n, in units of a cluster's."""
        return self.sequences * self.splits * self._token_tiles, -(
            -self.n // (self.out_block_n * self.tiling.cluster_n)
        )

    @property
    def tiles(self) -> int:
        """Tiles in units of a cluster's."""
        return self._tile_grid[0] * self._tile_grid[1]

    @property
    def clusters(self) -> int:
        """Persistent clusters; 0 if `blocks` are too few for one."""
        return min(self.blocks // self.tiling.cluster_size, self.tiles)

    def tiles_of_cluster(self):
        """How many tiles this cluster has."""
        return lax.div(self.tiles - lax.axis_index("cluster") + self.clusters - 1, self.clusters)

    def block_origin(self, index) -> TileOrigin:
        """Where this block's share of the cluster's index-th tile begins."""
        tiling = self.tiling
        m_tile, n_tile = plgpu.planar_snake(
            lax.axis_index("cluster") + index * self.clusters,
            self._tile_grid,
            minor_dim=0 if tiling.band_axis == "m" else 1,
            tile_width=tiling.band,
        )
        sequence = 0
        if self.sequences * self.splits > 1:
            sequence, m_tile = lax.div(m_tile, self._token_tiles), lax.rem(m_tile, self._token_tiles)
        return TileOrigin(
            sequence,
            (m_tile * tiling.cluster_m + lax.axis_index("cluster_m")) * tiling.block_m,
            (n_tile * tiling.cluster_n + lax.axis_index("cluster_n")) * self.out_block_n,
        )

    def token_segment(self, origin: TileOrigin):
        """The sequence of a tile's tokens."""
        return 0 if self.splits > 1 else origin.sequence

    def first_step(self, origin: TileOrigin):
        """The first step over K of a tile's split."""
        return origin.sequence * self.steps_over_k if self.splits > 1 else 0

    def consumer_rank(self, consumer):
        """Rank of this block's consumer among the consumers of all blocks, and their number."""
        tiling = self.tiling
        block = lax.axis_index("cluster")
        for name, size in (("cluster_m", tiling.cluster_m), ("cluster_n", tiling.cluster_n)):
            block = block * size + lax.axis_index(name)
        return block * CONSUMERS + consumer, self.clusters * tiling.cluster_size * CONSUMERS

    # Indices of buffers and barriers.

    def next_slot(self, slot):
        """The stage of the ring buffer after this one."""
        return lax.select(slot + 1 == self.tiling.slots, 0, slot + 1)

    def terms_buffer(self, index):
        """Which of the buffers of terms the index-th tile has: one for every tile in progress."""
        return lax.rem(index, self.tiling.tiles_in_progress)

    def full_barrier(self, index, slot):
        """Which barrier says that a stage of the index-th tile is loaded.

        A barrier's phase bit counts what one waiter has seen, and consumers of alternate tiles see every other tile:
        each has barriers of its own.
        """
        return self.terms_buffer(index) * self.tiling.slots + slot
