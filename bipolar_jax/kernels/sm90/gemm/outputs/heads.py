"""Queries, keys and values of prompts: a tile of the joined product leaves in chunks, half a head of 64 tokens each.

All columns of a head are in one tile. A rotation pairs columns d and d + size / 2 of a row: numbers of the same thread,
in two chunks of the accumulator, so that no thread needs another's. Their cosines and sines arrive under the mainloop
in the staging slots that both halves leave by, as a residual does (`dense.py`). Keys and values are stored twice from
the same slot: to the arrays that the prompt's attention reads, and to the cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.semantics.rotation import STEPS_PER_UNIT
from bipolar_jax.kernels.sm90.arithmetic.epilogue import staging_transforms
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout, clear_cache_from
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Finish
from bipolar_jax.kernels.sm90.gemm.problem import Problem, TileOrigin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadOutput:
    """Heads in memory, q, k and v [sequences, m, heads * size], and those of keys and values in the caches' layer.

    Heads have the dtype of the caches, a 16-bit float.

    Attributes:
      keys, values: caches, [layers, sequences, heads, capacity, size].
      layer: index of the caches' layer, [1].
      tables: cosines and sines by position, see `semantics.rotation`, [covered tokens, half] each, their bits as
        numbers of the heads' dtype; None stores queries and keys as they are.
      layout: what columns are.
      gains: of the norms of heads of queries and of keys, [size] each; None if there are none.
    """

    keys: Any
    layer: Any
    tables: tuple[Any, Any] | None
    values: Any
    layout: HeadLayout = dataclasses.field(metadata={"static": True})
    gains: tuple[Any, Any] | None = None
    token_axis: ClassVar[int] = 0
    dtype: ClassVar[jnp.dtype] = jnp.dtype(jnp.float32)  # they are rotated before they are rounded
    name_endings: ClassVar[tuple[str, ...]] = ("heads",)

    def out_types(self, problem: Problem) -> list[jax.ShapeDtypeStruct]:
        """Heads side by side: a TMA store then ends with its sequence, as it has to."""
        counts = (self.layout.queries, self.layout.keys, self.layout.keys)
        shapes = [(problem.sequences, problem.m, count * self.layout.size) for count in counts]
        return [jax.ShapeDtypeStruct(shape, self.keys.dtype) for shape in shapes]

    def scratch(self, problem: Problem, staging_slots: int) -> dict[str, Any]:
        """A staging slot for every chunk of a tile, [consumers, chunks, 64, half]; with tables, a barrier for each."""
        dtype, half, tiling = self.keys.dtype, self.layout.half, problem.tiling
        fit, slots = self.layout.staging_slots(staging_slots), self.layout.chunks(tiling.tile_m, tiling.tile_n)
        if fit < slots:
            raise ValueError(f"{tiling} has shared memory for {fit} of {slots} halves of heads: use fewer slots")
        shape = (CONSUMERS, slots, ROWS_PER_INSTRUCTION, half)
        staging = plgpu.SMEM(shape, dtype, transforms=staging_transforms(half, dtype))
        if self.tables is None:
            return {"staging": staging}
        return {"staging": staging, "arrived": plgpu.Barrier(num_barriers=CONSUMERS * slots)}

    def writer(self, problem: Problem, targets, scratch: dict[str, Any], consumer) -> HeadWriter:
        staging, arrived = scratch["staging"].at[consumer], scratch.get("arrived")
        return HeadWriter(problem, self, *targets, self.layer[0], staging, arrived, consumer)


@dataclasses.dataclass(frozen=True)
class HeadWriter:
    """Stores the heads in the tiles of one consumer; a tile begins and ends with whole heads.

    A subclass for other accumulators says how halves of heads are finished, and how they pass through staging slots.

    Attributes:
      problem: the product.
      output: the caches and tables, refs in memory.
      q, k, v: refs of the heads in memory.
      layer: index of the caches' layer.
      staging: [chunks of a tile, 64, half] in shared memory.
      arrived: barriers of the tables' arrival, one for every slot of all consumers, or None.
      consumer: index of this warpgroup.
    """

    problem: Problem
    output: HeadOutput
    q: Any
    k: Any
    v: Any
    layer: Any
    staging: Any
    arrived: Any
    consumer: Any

    token_axis: ClassVar[int] = 0  # of halves of heads in registers

    @property
    def layout(self) -> HeadLayout:
        return self.output.layout

    @property
    def finish_shape(self) -> tuple[int, int]:
        """A chunk: two halves of a head, and a cosine and a sine for each pair, are in registers at once."""
        return ROWS_PER_INSTRUCTION, self.layout.half

    def _head_origins(self) -> list[tuple[int, int]]:
        """Where each head of 64 tokens begins in the tile, in order."""
        tiling = self.problem.tiling
        rows = range(0, tiling.tile_m, ROWS_PER_INSTRUCTION)
        return list(itertools.product(rows, range(0, tiling.tile_n, self.layout.size)))

    def _head(self, origin: TileOrigin, number: int):
        """Index of the tile's number-th head in the layout, and whether it is rotated: queries and keys are."""
        _, first = self._head_origins()[number]
        head = lax.div(origin.column + first, self.layout.size)
        return head, head < self.layout.queries + self.layout.keys

    @staticmethod
    def _slot(number: int, half: int) -> int:
        """The staging slot of one half of a head; every chunk of a tile has its own."""
        return 2 * number + half

    def _arrivals(self) -> list[Any]:
        """The barriers of this consumer's slots."""
        slots = self.staging.shape[0]
        return [self.arrived.at[self.consumer * slots + slot] for slot in range(slots)]

    def start(self) -> None:
        """Clears the positions of the cache that are beyond all tiles."""
        problem, caches = self.problem, (self.output.keys, self.output.values)
        rank, consumers = problem.consumer_rank(self.consumer)
        clear_cache_from(
            self.layout, problem.sequences, problem.covered_tokens, self.staging, caches, self.layer, rank, consumers
        )

    def preload(self, origin: TileOrigin) -> None:
        """Loads the cosines and sines of the heads that are rotated, to the slots of their halves."""
        if self.output.tables is None:
            return
        arrivals = self._arrivals()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number, (row, _) in enumerate(self._head_origins()):
            _, rotates = self._head(origin, number)

            @when(rotates)
            def _(number=number, row=row):
                for half, table in enumerate(self.output.tables):
                    slot = self._slot(number, half)
                    positions = table.at[pl.ds(origin.token + row, ROWS_PER_INSTRUCTION)]
                    plgpu.copy_gmem_to_smem(positions, self.staging.at[slot], arrivals[slot])

    def store(self, origin: TileOrigin, finished: Finish) -> None:
        """Rotates and stores the heads of a tile."""
        if self.output.tables is None:
            # The stores of the tile before must be done with the slots. With tables, `preload` has waited for them.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number, (row, first) in enumerate(self._head_origins()):
            head, rotates = self._head(origin, number)
            halves = self._halves(finished, row, first)
            if self.problem.m < self.problem.covered_tokens:
                halves = [self._clear_beyond_prompt(half, origin.token + row) for half in halves]
            if self.output.tables is None:
                self._store_head(origin, number, head, halves)
                continue

            # Not `branches.when`: ptxas then spills registers of heads of 64.
            @pl.when(rotates)
            def _(number=number, head=head, halves=halves):
                normalized = self._normalized(halves, head)
                self._store_head(origin, number, head, rotated(normalized, self._tables(number)), are_values=False)

            @pl.when(jnp.logical_not(rotates))
            def _(number=number, head=head, halves=halves):
                self._store_head(origin, number, head, halves, are_values=True)

    def _halves(self, finished: Finish, row: int, first: int) -> list[Float[Array, "64 half"]]:
        """Both halves of the head of 64 tokens that begins in that row and column of the tile."""
        return [finished(row, first), finished(row, first + self.layout.half)]

    def _normalized(self, halves: list[Float[Array, "64 half"]], head) -> list[Float[Array, "64 half"]]:
        """A head of queries or keys after its norm, if there is one."""
        del head
        return halves

    def _read(self, slot: int) -> Float[Array, "64 half"]:
        """What a staging slot holds, as halves of heads are in registers.

        Every thread reads the numbers that it writes later, so that no barrier is needed between.
        """
        return plgpu.load(self.staging.at[slot], layout=plgpu.Layout.WGMMA)

    def _write(self, slot: int, half: Float[Array, "64 half"]) -> None:
        """Half of a head to a staging slot, tokens as rows."""
        self.staging[slot] = half

    def _tables(self, number: int) -> list[Float[Array, "64 half"]]:
        """Cosines and sines of a head's tokens, once they have arrived."""
        slots = [self._slot(number, half) for half in (0, 1)]
        arrivals = self._arrivals()
        for slot in slots:
            plgpu.barrier_wait(arrivals[slot])
        return [self._read(slot) for slot in slots]

    def _clear_beyond_prompt(self, half: Float[Array, "64 half"], position) -> Float[Array, "64 half"]:
        """Zeros for the tokens beyond the prompt, as the cache has to have them."""
        token = plgpu.broadcasted_iota(jnp.int32, half.shape, self.token_axis, layout=plgpu.Layout.WGMMA)
        return jnp.where(token + position < self.problem.m, half, 0.0)

    def _store_head(self, origin: TileOrigin, number: int, head, halves: list, are_values: bool | None = None) -> None:
        """Stores both halves of a tile's number-th head.

        Args:
          origin: of the tile.
          number: of the head in the tile.
          head: its index in the layout.
          halves: [64, half] each, float32.
          are_values: whether it is a head of values; None if the kernel has to find out.
        """
        row, _ = self._head_origins()[number]
        for i, half in enumerate(halves):
            slot = self._slot(number, i)
            self._write(slot, half.astype(self.staging.dtype))
            plgpu.commit_smem()
            at_row = TileOrigin(origin.sequence, origin.token + row, origin.column)
            self._copy(self.staging.at[slot], at_row, head, i * self.layout.half, are_values)
            # One group for a chunk, whether it is stored once or twice.
            plgpu.commit_smem_to_gmem_group()

    def _copy(self, chunk, origin: TileOrigin, head, first: int, are_values: bool | None) -> None:
        """Issues the stores of a chunk, whose columns begin at `first` of its head."""
        layout, output = self.layout, self.output
        columns = pl.ds(first, layout.half)
        positions = pl.ds(origin.token, ROWS_PER_INSTRUCTION)

        def to_heads(heads, index):
            begin = index * layout.size + first
            target = heads.at[origin.sequence, positions, pl.ds(begin, layout.half)]
            plgpu.copy_smem_to_gmem(chunk, target, commit_group=False)

        def to_cache(cache, index):
            target = cache.at[self.layer, origin.sequence, index, positions, columns]
            plgpu.copy_smem_to_gmem(chunk, target, commit_group=False)

        key, value = head - layout.queries, head - layout.queries - layout.keys
        if are_values is not True:

            @when(key < 0)
            def _():
                to_heads(self.q, head)

            @when((key >= 0) & (value < 0))
            def _():
                to_heads(self.k, key)
                to_cache(output.keys, key)

        if are_values is not False:

            @when(value >= 0)
            def _():
                # Heads beyond the last still issue a fully clipped TMA store, so that group counts stay uniform.
                to_heads(self.v, value)

            @when((value >= 0) & (value < layout.keys))
            def _():
                to_cache(output.values, value)


def rotated(
    halves: list[Float[Array, "rows half"]], tables: list[Float[Array, "rows half"]]
) -> list[Float[Array, "rows half"]]:
    """Rotates pairs (d, d + half) of every row by the angle of its position.

    Args:
      halves: of a head, float32.
      tables: cosines and sines of the rows, `fixed_point_tables` with their bits as numbers of a 16-bit float dtype.
    """
    first, second = halves
    cos, sin = (lax.bitcast_convert_type(table, jnp.int16).astype(jnp.float32) for table in tables)
    # A power of two: scaling by it rounds nothing, before or after the products.
    first, second = first * (1 / STEPS_PER_UNIT), second * (1 / STEPS_PER_UNIT)
    return [first * cos - second * sin, second * cos + first * sin]
