"""The product as a matrix in memory, from accumulators whose columns are tokens; and a residual that is added to it.

A consumer's tile leaves in chunks of 64 tokens by 64 columns, transposed on their way through staging slots in shared
memory, and is stored by TMA. A residual arrives in the same slots: that of the first chunks under the mainloop, that of
every later chunk while the one before is finished.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.core.hardware import TMA_ALIGNMENT
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR, BYTES_PER_ROW
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Finish
from bipolar_jax.kernels.sm90.gemm.problem import TileOrigin
from bipolar_jax.kernels.sm90.gemm.producer import aligned
from bipolar_jax.kernels.sm90.gemm_expanded.problem import CHUNK_COLUMNS, CHUNK_TOKENS, ExpandedProblem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedOutput:
    """[m, n] in memory, or [splits, m, n]: sums of splits of K, without a residual.

    TMA needs rows of whole 16 bytes: columns are padded to that, and the caller slices them off.

    Attributes:
      residual: of `dtype` and the padded shape, added to the numbers after they are rounded to `dtype`; or None.
      dtype: float32, bfloat16, float16, or int32.
    """

    residual: Any
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    token_axis: ClassVar[int] = 1

    @classmethod
    def of(cls, dtype: jnp.dtype, residual: Float[Array, "m n"] | None) -> TransposedOutput:
        """With the residual as the kernel loads it."""
        return cls(None if residual is None else aligned(residual.astype(dtype)), dtype)

    @property
    def name_endings(self) -> tuple[str, ...]:
        return () if self.residual is None else ("residual",)

    def out_types(self, problem: ExpandedProblem) -> list[jax.ShapeDtypeStruct]:
        columns_unit = TMA_ALIGNMENT // self.dtype.itemsize
        splits = (problem.splits,) if problem.splits > 1 else ()
        return [jax.ShapeDtypeStruct((*splits, problem.m, -(-problem.n // columns_unit) * columns_unit), self.dtype)]

    def scratch(self, problem: ExpandedProblem, staging_slots: int) -> dict[str, Any]:
        """Staging slots, [consumers, slots, CHUNK_TOKENS, CHUNK_COLUMNS]; with a residual, a barrier for each."""
        # Rows of 128 bytes are swizzled: threads write 16-bit numbers without bank conflicts.
        swizzled = CHUNK_COLUMNS * self.dtype.itemsize == BYTES_PER_ROW
        staging = plgpu.SMEM(
            (CONSUMERS, staging_slots, CHUNK_TOKENS, CHUNK_COLUMNS),
            self.dtype,
            # Without tiling: TMA then takes any number of tokens.
            transforms=(plgpu.SwizzleTransform(BYTES_PER_ROW),) if swizzled else (),
        )
        if self.residual is None:
            return {"staging": staging}
        return {"staging": staging, "arrived": plgpu.Barrier(num_barriers=CONSUMERS * staging_slots)}

    def writer(self, problem: ExpandedProblem, targets, scratch: dict[str, Any], consumer) -> TransposedWriter:
        staging, arrived = scratch["staging"].at[consumer], scratch.get("arrived")
        return TransposedWriter(problem, self.residual, targets[0], staging, arrived, consumer)


@dataclasses.dataclass(frozen=True)
class TransposedWriter:
    """Stores the tiles of one consumer, plus the residual.

    Attributes:
      problem: the product.
      residual: ref in memory, or None.
      out: [m, n] or [splits, m, n] in memory.
      staging: [slots, CHUNK_TOKENS, CHUNK_COLUMNS] in shared memory.
      arrived: barriers of the residual's arrival, one for every slot of all consumers, or None.
      consumer: index of this warpgroup.
    """

    problem: ExpandedProblem
    residual: Any
    out: Any
    staging: Any
    arrived: Any
    consumer: Any

    finish_shape = (CHUNK_COLUMNS, CHUNK_TOKENS)

    def start(self) -> None:
        pass

    def preload(self, origin: TileOrigin) -> None:
        """Loads the residual of the first chunks, one a slot."""
        if self.residual is None:
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(min(self.staging.shape[0], len(self._chunks()))):
            self._load_residual(origin, number)

    def store(self, origin: TileOrigin, finished: Finish) -> None:
        slots, chunks = self.staging.shape[0], self._chunks()
        for number, (column, token) in enumerate(chunks):
            slot = number % slots
            chunk = finished(column, token)
            # A slot has tokens as rows, the accumulator as columns.
            transposed = self._staged(number).transpose((1, 0))
            if self.residual is not None:
                plgpu.barrier_wait(self._arrived(slot))
                residual = plgpu.layout_cast(
                    plgpu.load(transposed, layout=self._staging_layout, optimized=False), plgpu.Layout.WGMMA
                )
                chunk = (chunk.astype(jnp.float32) + residual.astype(jnp.float32)).astype(chunk.dtype)
            elif number == 0:
                # The store that read this slot before may be one of the tile before, which may have ended in any slot.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            elif number >= slots:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            transposed[...] = plgpu.layout_cast(chunk, self._staging_layout)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self._staged(number), self._in_memory(self.out, origin, number))
            # Refills the slot of the chunk before this one, whose store has read it by now; with a single slot, this
            # one's.
            lag = min(1, slots - 1)
            following = number - lag + slots
            if self.residual is not None and number >= lag and following < len(chunks):
                plgpu.wait_smem_to_gmem(lag, wait_read_only=True)
                self._load_residual(origin, following)

    @property
    def _staging_layout(self) -> plgpu.Layout:
        """Pairs of 16-bit tokens are transposed by the store; numbers of 32 bits are stored one by one."""
        return plgpu.Layout.WGMMA if self.out.dtype.itemsize == 2 else ACCUMULATOR

    def _chunks(self) -> list[tuple[int, int]]:
        """(column, token) of the tile's chunks, in order."""
        columns = range(0, self.problem.out_tile_n, CHUNK_COLUMNS)
        return list(itertools.product(columns, range(0, self.problem.tiling.tile_m, CHUNK_TOKENS)))

    def _width(self, token: int) -> int:
        """Tokens of the chunk that begins there."""
        return min(CHUNK_TOKENS, self.problem.tiling.tile_m - token)

    def _staged(self, number: int):
        """A chunk's rows of its slot."""
        _, token = self._chunks()[number]
        return self.staging.at[number % self.staging.shape[0], pl.ds(0, self._width(token))]

    def _load_residual(self, origin: TileOrigin, number: int) -> None:
        """Starts the load of a chunk's residual to its slot."""
        slot = number % self.staging.shape[0]
        source = self._in_memory(self.residual, origin, number)
        plgpu.copy_gmem_to_smem(source, self._staged(number), self._arrived(slot))

    def _arrived(self, slot: int) -> Any:
        return self.arrived.at[self.consumer * self.staging.shape[0] + slot]

    def _in_memory(self, array, origin: TileOrigin, number: int):
        """A chunk's part of [m, n] in memory."""
        column, token = self._chunks()[number]
        array = array if self.problem.splits == 1 else array.at[origin.sequence]
        return array.at[pl.ds(origin.token + token, self._width(token)), pl.ds(origin.column + column, CHUNK_COLUMNS)]
