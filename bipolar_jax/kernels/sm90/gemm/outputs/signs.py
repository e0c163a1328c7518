"""The signs of the product: one-bit tokens of the next product, and what the scales of those tokens are made of.

Signs take a sixteenth of the memory of the numbers. The threads store them from registers; nothing is staged.

A token's scale is its largest magnitude, which is known when all tiles of its row are. So every tile leaves a summary
of its part of the row, the largest magnitude and the number of ones, and XLA combines them (`projections`). Neither
depends on the order of the tiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up, pack_planes
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import packed_word, scalar_of
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Finish
from bipolar_jax.kernels.sm90.gemm.outputs.sign_packing import COUNT_BITS, SignPacking
from bipolar_jax.kernels.sm90.gemm.problem import Problem, TileOrigin
from bipolar_jax.packing.words import WORD_BITS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignOutput:
    """Two arrays of uint32.

    - signs [1, m, row_words]: bits as `PackedTokens` has "planes"; a one for a number from 0 on, -0, or NaN;
    - summaries [column tiles, vector_length(m)]: of a row's part in a tile, see `sign_packing.COUNT_BITS`.

    Attributes:
      dtype: bfloat16 or float16, to which numbers are rounded before.
    """

    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    token_axis: ClassVar[int] = 0
    name_endings: ClassVar[tuple[str, ...]] = ("signs",)

    def out_types(self, problem: Problem) -> list[jax.ShapeDtypeStruct]:
        packing = self._packing(problem)
        shapes = (1, problem.m, packing.row_words), (packing.tiles, packing.vector_length)
        return [jax.ShapeDtypeStruct(shape, jnp.uint32) for shape in shapes]

    def scratch(self, problem: Problem, staging_slots: int) -> dict[str, Any]:
        return {}

    def writer(self, problem: Problem, targets, scratch: dict[str, Any], consumer) -> SignWriter:
        return SignWriter(self._packing(problem), problem.tiling.tile_m, *targets)

    def _packing(self, problem: Problem) -> SignPacking:
        return SignPacking(self.dtype.name, problem.m, problem.n, problem.out_tile_n)


@dataclasses.dataclass(frozen=True)
class SignWriter:
    """Stores the signs of one consumer's tiles.

    Attributes:
      packing: what each thread does with 64 rows.
      tile_m: rows of a tile.
      signs, summaries: refs in memory.
    """

    packing: SignPacking
    tile_m: int
    signs: Any
    summaries: Any

    finish_shape = (ROWS_PER_INSTRUCTION, WORD_BITS)

    def start(self) -> None:
        pass

    def preload(self, origin: TileOrigin) -> None:
        pass

    def store(self, origin: TileOrigin, finished: Finish) -> None:
        height, width = self.finish_shape
        for row in range(0, self.tile_m, height):
            chunks = []
            for column in range(0, self.packing.tile_n, width):
                chunks.append(finished(row, column))
                # Stops ptxas from overlapping chunks: it would spill. The last barrier also comes after all reads of
                # the terms, which the producer overwrites next.
                synchronize()
            _store_signs(self.packing, chunks, origin.token + row, origin.column, self.signs, self.summaries)


def _store_signs_twin(packing: SignPacking, chunks: list[jax.Array], row, column, signs, summaries) -> None:
    numbers = jnp.concatenate(chunks, axis=1)
    is_column = lax.broadcasted_iota(jnp.int32, numbers.shape, 1) < packing.n - column
    codes = (is_column & ~(numbers < 0)).astype(jnp.uint8)
    magnitudes = lax.bitcast_convert_type(numbers, jnp.uint16) & 0x7FFF
    largest = jnp.max(jnp.where(is_column, magnitudes, 0), axis=1).astype(jnp.uint32)
    row_summaries = (largest << COUNT_BITS) | jnp.sum(codes, axis=1, dtype=jnp.uint32)
    tile, first_word = lax.div(column, packing.tile_n), lax.div(column, WORD_BITS)
    is_last_tile = column + packing.tile_n >= packing.n
    end_of_tile = jnp.minimum(first_word + packing.tile_words, packing.row_words)
    # The last tile also clears the words that fill a row up to 16 bytes.
    end = jnp.where(is_last_tile, packing.row_words, end_of_tile)
    words = fill_up(pack_planes(codes, BipolarFormat(1))[0], packing.tile_words + 3)

    @pl.loop(0, jnp.where(column < packing.n, jnp.clip(packing.m - row, 0, numbers.shape[0]), 0))
    def _(i):
        summaries[tile, row + i] = row_summaries[i]
        for word in range(words.shape[1]):

            @when(first_word + word < end)
            def _(word=word):
                signs[0, row + i, first_word + word] = words[i, word]


@with_twin(_store_signs_twin)
def _store_signs(packing: SignPacking, chunks: list[jax.Array], row, column, signs, summaries) -> None:
    """Stores the signs and summaries of 64 rows.

    Args:
      packing: what each thread does.
      chunks: [64, 32] each, the tile's columns in order; of `packing.dtype`, in the layout WGMMA.
      row, column: where the chunks begin in the output.
      signs, summaries: refs in memory.
    """
    layouts = [plgpu.Layout.WGMMA] * len(chunks) + [plgpu.Layout.WG_SPLAT] * 2

    @plgpu.inline_mgpu(arg_types=(*layouts, plgpu.RefType(), plgpu.RefType()))
    def inline(_, *args):
        *chunks, row, column, signs, summaries = args
        # Registers are pairs of adjacent columns, alternating between the thread's two rows.
        pairs = [packed_word(register) for chunk in chunks for register in chunk.registers.flat]
        packing.store([pairs[0::2], pairs[1::2]], scalar_of(row), scalar_of(column), signs, summaries)

    inline(*chunks, row, column, signs, summaries)
