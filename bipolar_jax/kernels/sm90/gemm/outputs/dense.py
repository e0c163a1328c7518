"""The product as a matrix in memory, and a residual that is added to it.

A consumer's tile leaves in chunks of 64 rows of up to 128 bytes, which pass through a few staging slots of shared
memory in turn and are stored by TMA. A residual arrives in the same slots: that of the first chunks under the mainloop,
that of every later chunk while the one before is finished. Each thread adds to its own numbers in place.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Num

from bipolar_jax.kernels.sm90.arithmetic.epilogue import chunk_columns, staging_transforms
from bipolar_jax.kernels.sm90.core.hardware import TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Finish
from bipolar_jax.kernels.sm90.gemm.problem import Problem, TileOrigin
from bipolar_jax.kernels.sm90.gemm.producer import aligned

# Elements. Up to here, a consumer has as many registers for its epilogue as for its accumulator.
_ROOMY_ACCUMULATOR = 128 * 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseOutput:
    """[m, n] in memory, or [splits, m, n]: sums of splits of K, without a residual.

    TMA needs rows of whole 16 bytes: columns are padded to that, and the caller slices them off.

    Attributes:
      residual: of `dtype` and the padded shape, added to the numbers after they are rounded to `dtype`; or None.
      dtype: float32, bfloat16, float16, or int32.
    """

    residual: Any
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    token_axis: ClassVar[int] = 0

    @classmethod
    def of(cls, dtype: jnp.dtype, residual: Float[Array, "m n"] | None) -> DenseOutput:
        """With the residual as the kernel loads it."""
        return cls(None if residual is None else aligned(residual.astype(dtype)), dtype)

    @property
    def name_endings(self) -> tuple[str, ...]:
        return () if self.residual is None else ("residual",)

    def out_types(self, problem: Problem) -> list[jax.ShapeDtypeStruct]:
        columns_unit = TMA_ALIGNMENT // self.dtype.itemsize
        splits = (problem.splits,) if problem.splits > 1 else ()
        return [jax.ShapeDtypeStruct((*splits, problem.m, -(-problem.n // columns_unit) * columns_unit), self.dtype)]

    def scratch(self, problem: Problem, staging_slots: int) -> dict[str, Any]:
        """Staging slots, [consumers, slots, 64, width]; with a residual, a barrier for each."""
        width = math.gcd(problem.out_tile_n, chunk_columns(self.dtype))
        staging = plgpu.SMEM(
            (CONSUMERS, staging_slots, ROWS_PER_INSTRUCTION, width),
            self.dtype,
            transforms=staging_transforms(width, self.dtype),
        )
        if self.residual is None:
            return {"staging": staging}
        return {"staging": staging, "arrived": plgpu.Barrier(num_barriers=CONSUMERS * staging_slots)}

    def writer(self, problem: Problem, targets, scratch: dict[str, Any], consumer) -> DenseWriter:
        staging, arrived = scratch["staging"].at[consumer], scratch.get("arrived")
        return DenseWriter(problem, self.residual, targets[0], staging, arrived, consumer)


@dataclasses.dataclass(frozen=True)
class DenseWriter:
    """Stores the tiles of one consumer, plus the residual.

    Attributes:
      problem: the product.
      residual: ref in memory, or None.
      out: [m, n] or [splits, m, n] in memory.
      staging: [slots, 64, width] in shared memory.
      arrived: barriers of the residual's arrival, one for every slot of all consumers, or None.
      consumer: index of this warpgroup.
    """

    problem: Problem
    residual: Any
    out: Any
    staging: Any
    arrived: Any
    consumer: Any

    @property
    def finish_shape(self) -> tuple[int, int]:
        """All rows of the tile if registers suffice."""
        tiling = self.problem.tiling
        registers_suffice = self.problem.factors * tiling.tile_m * tiling.tile_n <= _ROOMY_ACCUMULATOR
        _, height, width = self.staging.shape
        return tiling.tile_m if registers_suffice else height, width

    def _finish_origins(self) -> list[tuple[int, int]]:
        """Where the numbers that are finished at once begin in the tile, in order."""
        (rows, columns), problem = self.finish_shape, self.problem
        return list(itertools.product(range(0, problem.tiling.tile_m, rows), range(0, problem.out_tile_n, columns)))

    def _chunk_origins(self) -> list[tuple[int, int]]:
        """Where the chunks begin in the tile, in order."""
        offsets = range(0, self.finish_shape[0], self.staging.shape[1])
        return [(row + offset, column) for row, column in self._finish_origins() for offset in offsets]

    def start(self) -> None:
        pass

    def preload(self, origin: TileOrigin) -> None:
        """Loads the residual of the first chunks, one a slot."""
        if self.residual is None:
            return
        arrivals = self._arrivals()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for chunk in range(min(self.staging.shape[0], len(self._chunk_origins()))):
            self._load_residual(origin, chunk, arrivals)

    def store(self, origin: TileOrigin, finished: Finish) -> None:
        chunks_at_once = self.finish_shape[0] // self.staging.shape[1]
        for number, (row, column) in enumerate(self._finish_origins()):
            self._store_chunks(origin, number * chunks_at_once, finished(row, column))

    def _store_chunks(self, origin: TileOrigin, first: int, numbers: Num[Array, "rows width"]) -> None:
        """Adds the residual to numbers that were finished at once, and stores them in chunks.

        Args:
          origin: of the tile.
          first: number of the first chunk in the tile.
          numbers: of `finish_shape`.
        """
        slots, height, width = self.staging.shape
        arrivals = None if self.residual is None else self._arrivals()
        # Small chunks, each on its way before the next is made, are faster than large ones.
        for i in range(numbers.shape[0] // height):
            number = first + i
            slot = number % slots
            chunk = lax.slice(numbers, (i * height, 0), ((i + 1) * height, width))
            # The store that read this slot before must be done with it: one of the tile before, which may have ended
            # in any slot, or that of the chunk `slots` before. A residual has arrived after that.
            if self.residual is not None:
                plgpu.barrier_wait(arrivals[slot])
                residual = plgpu.load(self.staging.at[slot], layout=plgpu.Layout.WGMMA)
                chunk = (chunk.astype(jnp.float32) + residual.astype(jnp.float32)).astype(chunk.dtype)
            elif number == 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            elif number >= slots:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            self.staging[slot] = chunk
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.staging.at[slot], self._in_memory(self.out, origin, number))
            # Refills the slot of the chunk before this one, whose store has read it by now; with a single slot, this
            # one's.
            lag = min(1, slots - 1)
            following = number - lag + slots
            if self.residual is not None and number >= lag and following < len(self._chunk_origins()):
                plgpu.wait_smem_to_gmem(lag, wait_read_only=True)
                self._load_residual(origin, following, arrivals)

    def _load_residual(self, origin: TileOrigin, chunk: int, arrivals: list[Any]) -> None:
        """Starts the load of a chunk's residual to its slot."""
        slot = chunk % self.staging.shape[0]
        plgpu.copy_gmem_to_smem(self._in_memory(self.residual, origin, chunk), self.staging.at[slot], arrivals[slot])

    def _arrivals(self) -> list[Any]:
        """The barriers of this consumer's slots."""
        slots = self.staging.shape[0]
        return [self.arrived.at[self.consumer * slots + slot] for slot in range(slots)]

    def _in_memory(self, array, origin: TileOrigin, chunk: int):
        """A chunk's part of [m, n] in memory."""
        array = array if self.problem.splits == 1 else array.at[origin.sequence]
        tile = array.at[pl.ds(origin.token, self.problem.tiling.tile_m), pl.ds(origin.column, self.problem.out_tile_n)]
        row, column = self._chunk_origins()[chunk]
        return tile.at[pl.ds(row, self.staging.shape[1]), pl.ds(column, self.staging.shape[2])]
