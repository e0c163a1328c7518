"""How one matmul is cut up: tiles, shared memory, order."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES, WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, ROWS_PER_INSTRUCTION

Schedule = Literal["split_m", "split_n", "alternate"]


# Registers of a thread of the producer and of a consumer, by the number of consumers: a block has 512
# for every thread of a warpgroup.
WARPGROUP_REGISTERS = {2: (40, 232), 3: (24, 160)}
_MOST_LOADED_ROWS = 256
_WORKING_REGISTERS = 32  # beside the accumulator


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Shape of the work of one block: a producer warpgroup and two or three consumers.

    Attributes:
      tile_m: rows of the accumulator of one consumer, 64 or 128.
      tile_n: its columns, a multiple of 64 up to 256.
      schedule: "split_m" and "split_n" give the consumers parts of one output tile, stacked
        along that axis; "alternate" gives each a tile of its own, so that one multiplies
        while the other is in its epilogue.
      slots: blocks of K that are in shared memory at a time.
      cluster_m: blocks along m that share their loads of w, 1 or 2.
      cluster_n: blocks along n that share their loads of x, 1 or 2.
      band: output tiles are visited in bands this wide, so that a wave of blocks reads few
        distinct rows and columns.
      band_axis: the axis along which a band is narrow, "m" or "n".
      consumers: warpgroups that multiply, 2 or 3; two have more registers each.
    """

    tile_m: int = 128
    tile_n: int = 128
    schedule: Schedule = "split_m"
    slots: int = 4
    cluster_m: int = 1
    cluster_n: int = 1
    band: int = 8
    band_axis: Literal["m", "n"] = "n"
    consumers: int = 2

    @property
    def block_m(self) -> int:
        """Rows of x that a block loads at a time."""
        return self.tile_m * (self.consumers if self.schedule == "split_m" else 1)

    @property
    def block_n(self) -> int:
        """Rows of w that a block loads at a time."""
        return self.tile_n * (self.consumers if self.schedule == "split_n" else 1)

    @property
    def cluster_size(self) -> int:
        return self.cluster_m * self.cluster_n

    def staging_slots(self, group_bytes: int = 0) -> int:
        """Pieces of output that a consumer has on their way to memory at a time: as many as fit."""
        pieces = self.tile_m * self.tile_n * 2 // (ROWS_PER_INSTRUCTION * BYTES_PER_ROW)
        fits = (self.shared_memory_bytes(group_bytes, n) <= SHARED_MEMORY_BYTES for n in range(1, pieces + 1))
        return max(1, sum(fits))

    def shared_memory_bytes(self, group_bytes: int = 0, staging_slots: int = 1) -> int:
        """Bytes of shared memory of one block, with so many for the terms of groups in every slot."""
        slots = self.slots * ((self.block_m + self.block_n) * BYTES_PER_ROW + group_bytes)
        staging = self.consumers * staging_slots * ROWS_PER_INSTRUCTION * BYTES_PER_ROW
        tiles_at_a_time = self.consumers if self.schedule == "alternate" else 1
        terms = tiles_at_a_time * (3 * self.block_m + 4 * self.block_n) * 4
        return slots + staging + terms

    def check(self, group_bytes: int = 0) -> None:
        """Raises ValueError unless a block of this shape fits the hardware.

        Args:
          group_bytes: for the terms of groups, in every slot; if there are any, there are two
            accumulators and a float sum.
        """
        if self.schedule not in get_args(Schedule) or self.band_axis not in ("m", "n") or self.band < 1:
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, and band 1 or more, got {self}")
        if {self.cluster_m, self.cluster_n} - {1, 2}:
            raise ValueError(f"clusters have 1 or 2 blocks along an axis, got {self}")
        if self.tile_m not in (64, 128) or self.tile_n % 64 or not 64 <= self.tile_n <= 256:
            raise ValueError(f"tile_m must be 64 or 128 and tile_n a multiple of 64 up to 256, got {self}")
        if self.consumers not in WARPGROUP_REGISTERS:
            raise ValueError(f"there are 2 or 3 consumers, got {self}")
        if max(self.block_m, self.block_n) > _MOST_LOADED_ROWS:
            raise ValueError(f"TMA loads at most {_MOST_LOADED_ROWS} rows at a time, got {self}")
        numbers = self.tile_m * self.tile_n // WARPGROUP * (3 if group_bytes else 1)
        if numbers > WARPGROUP_REGISTERS[self.consumers][1] - _WORKING_REGISTERS:
            raise ValueError(f"an accumulator of {self.tile_m} x {self.tile_n} does not fit a warpgroup's registers")
        needed = self.shared_memory_bytes(group_bytes)
        if self.slots < 2 or needed > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"{self} takes {needed} bytes of shared memory of {SHARED_MEMORY_BYTES}: "
                "use fewer slots or smaller tiles, and at least 2 slots"
            )
