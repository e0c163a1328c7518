"""Tile shapes of the product: what a block multiplies, in which order, and whether it fits the hardware."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES, WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ROWS_PER_INSTRUCTION

Schedule = Literal["split_m", "split_n", "alternate"]

CONSUMERS = 2  # warpgroups of a block that multiply, beside one producer
# A multiprocessor has 512 registers for every thread index of a warpgroup: 40 + 2 * 232 = 504.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
_WORKING_REGISTERS = 32  # of a consumer's thread, beside its accumulators
_MOST_TMA_ROWS = 256  # of one copy
_CHUNK_BYTES = ROWS_PER_INSTRUCTION * BYTES_PER_ROW  # of output on its way to memory


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one block, a producer and two consumer warpgroups, cuts up the product.

    Attributes:
      tile_m: rows of a consumer's accumulator, 64 or 128; tokens in `gemm_expanded`, whose `problem.py` says how many.
      tile_n: its columns, a multiple of 64 up to 256.
      schedule: "split_m" and "split_n" stack the accumulators of both consumers along that axis to one tile of the
        block; "alternate" gives each consumer a tile of its own, so that one multiplies while the other is in its
        epilogue.
      slots: stages of the ring buffer of operand tiles; a stage is 128 bytes of K.
      cluster_m: blocks along m that share their loads of w by multicast, 1 or 2.
      cluster_n: blocks along n that share their loads of x, 1 or 2.
      band: output tiles are visited in bands of this width, so that blocks that run at the same time read few
        distinct rows and columns, which stay in L2.
      band_axis: the axis along which a band is narrow, "m" or "n".
      splits: parts of K that blocks multiply as tiles of their own; XLA adds their sums (`arithmetic.split_sums`).
    """

    tile_m: int = 128
    tile_n: int = 128
    schedule: Schedule = "split_m"
    slots: int = 4
    cluster_m: int = 1
    cluster_n: int = 1
    band: int = 8
    band_axis: Literal["m", "n"] = "n"
    splits: int = 1

    @property
    def block_m(self) -> int:
        """Rows of x in a stage of the ring buffer."""
        return self.tile_m * (CONSUMERS if self.schedule == "split_m" else 1)

    @property
    def block_n(self) -> int:
        """Rows of w in a stage of the ring buffer."""
        return self.tile_n * (CONSUMERS if self.schedule == "split_n" else 1)

    @property
    def cluster_size(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_m * self.cluster_n

    @property
    def tiles_in_progress(self) -> int:
        """Tiles that a block multiplies or finishes at the same time."""
        return CONSUMERS if self.schedule == "alternate" else 1

    @property
    def consumers_per_tile(self) -> int:
        """Consumers that multiply one tile."""
        return CONSUMERS // self.tiles_in_progress

    def staging_slots(self, group_bytes: int = 0) -> int:
        """Chunks of output, 64 rows of 128 bytes, that each consumer can have on their way to memory.

        As many as fit beside the ring buffer, at most a tile of 16-bit numbers, and at least one.
        """
        chunks = self.tile_m * self.tile_n * 2 // _CHUNK_BYTES
        fits = (self.shared_memory_bytes(group_bytes, n) <= SHARED_MEMORY_BYTES for n in range(1, chunks + 1))
        return max(1, sum(fits))

    def shared_memory_bytes(self, group_bytes: int = 0, staging_slots: int = 1) -> int:
        """Bytes of shared memory of one block, `group_bytes` of them for the terms of groups in every stage."""
        stages = self.slots * ((self.block_m + self.block_n) * BYTES_PER_ROW + group_bytes)
        staging = CONSUMERS * staging_slots * _CHUNK_BYTES
        # At most three vectors over the tokens of a tile, and four over its columns.
        terms = self.tiles_in_progress * (3 * self.block_m + 4 * self.block_n) * 4
        return stages + staging + terms

    def check(self, group_bytes: int = 0) -> None:
        """Raises ValueError unless a block of this shape fits the hardware.

        Args:
          group_bytes: of the terms of groups in every stage. If there are any, a consumer has two int32 accumulators
            and a float32 sum.
        """
        if self.schedule not in get_args(Schedule) or self.band_axis not in ("m", "n") or self.band < 1:
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, and band 1 or more, got {self}")
        if self.splits < 1:
            raise ValueError(f"splits must be 1 or more, got {self}")
        if {self.cluster_m, self.cluster_n} - {1, 2}:
            raise ValueError(f"clusters have 1 or 2 blocks along an axis, got {self}")
        if self.tile_m not in (64, 128) or self.tile_n % 64 or not 64 <= self.tile_n <= 256:
            raise ValueError(f"tile_m must be 64 or 128 and tile_n a multiple of 64 up to 256, got {self}")
        if max(self.block_m, self.block_n) > _MOST_TMA_ROWS:
            raise ValueError(f"TMA loads at most {_MOST_TMA_ROWS} rows at a time, got {self}")
        registers = self.tile_m * self.tile_n // WARPGROUP * (3 if group_bytes else 1)
        if registers > CONSUMER_REGISTERS - _WORKING_REGISTERS:
            raise ValueError(f"an accumulator of {self.tile_m} x {self.tile_n} does not fit a warpgroup's registers")
        needed = self.shared_memory_bytes(group_bytes)
        if self.slots < 2 or needed > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"{self} takes {needed} bytes of shared memory of {SHARED_MEMORY_BYTES}: "
                "use fewer slots or smaller tiles, and at least 2 slots"
            )
