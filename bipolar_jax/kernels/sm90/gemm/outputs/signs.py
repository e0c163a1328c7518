"""A tile of the output on its way to the next product of one-bit tokens: signs as words, and parts of tokens' scales.

What is stored is a sixteenth of the numbers, from registers: there is nothing to stage. A token's scale is its largest
magnitude, known when all tiles of its row are: each leaves that of its part, and how many ones it has, for XLA to put
together. Neither depends on an order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up, pack_planes
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.core.wgmma import ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm.outputs.sign_threads import COUNT_BITS, SignThreads
from bipolar_jax.packing.words import WORD_BITS


class SignTargets(NamedTuple):
    """Where signs go; refs in memory.

    Attributes:
      words: uint32 [1, m, row words], as `PackedTokens` has "planes".
      partials: uint32 [column tiles, filled rows], summaries of rows in a tile: `sign_threads.COUNT_BITS`.
    """

    words: Any
    partials: Any


@dataclasses.dataclass(frozen=True)
class SignPieces:
    """Of one consumer's tile.

    Attributes:
      threads: what they do with 64 rows.
      tile_m: rows of the tile.
      targets: where signs go.
      origin: first row and column.
      emulate: whether this is interpret mode.
    """

    threads: SignThreads
    tile_m: int
    targets: SignTargets
    origin: tuple[Int[Array, ""], Int[Array, ""]]
    emulate: bool

    width = WORD_BITS  # columns to finish at once
    rows_at_once = ROWS_PER_INSTRUCTION  # likewise rows

    def store(self, finished: Callable[[int, int], Float[Array, "64 32"]]) -> None:
        """Sends the signs of all of the tile.

        Args:
          finished: numbers of the output, from the row and column of the tile where they begin.
        """
        row, column = self.origin
        for start in range(0, self.tile_m, self.rows_at_once):
            pieces = []
            for first in range(0, self.threads.tile_n, self.width):
                pieces.append(finished(start, first))
                # Before the next piece is begun, for which there are no registers. Behind the last one the loads of
                # the columns' and tokens' terms lie, whose place the producer then fills anew.
                synchronize()
            (_emulated if self.emulate else _leave)(self.threads, pieces, row + start, column, self.targets)


def _leave(threads: SignThreads, pieces: list[Array], row, column, targets: SignTargets) -> None:
    splat = plgpu.Layout.WG_SPLAT
    arrays = [plgpu.Layout.WGMMA] * len(pieces)

    @plgpu.inline_mgpu(arg_types=(*arrays, splat, splat, *[plgpu.RefType()] * len(targets)))
    def inline(_, *args):
        pieces, (row, column, *targets) = args[: len(arrays)], args[len(arrays) :]
        # A piece's registers are pairs of columns, 8 apart, each of both rows.
        registers = [register for piece in pieces for register in piece.registers.flat]
        words = [llvm.bitcast(ptx.i32_type(), register) for register in registers]
        threads.leave([words[0::2], words[1::2]], row.registers.item(), column.registers.item(), *targets)

    inline(*pieces, row, column, *targets)


def _emulated(threads: SignThreads, pieces: list[Array], row, column, targets: SignTargets) -> None:
    numbers = jnp.concatenate(pieces, axis=1)
    valid = lax.broadcasted_iota(jnp.int32, numbers.shape, 1) < threads.n - column
    codes = (valid & ~(numbers < 0)).astype(jnp.uint8)
    words = pack_planes(codes, BipolarFormat(1))[0]
    magnitudes = lax.bitcast_convert_type(numbers, jnp.uint16) & 0x7FFF
    largest = jnp.max(jnp.where(valid, magnitudes, 0), axis=1).astype(jnp.uint32)
    summaries = (largest << COUNT_BITS) | jnp.sum(codes, axis=1, dtype=jnp.uint32)
    tile, first = lax.div(column, threads.tile_n), lax.div(column, WORD_BITS)
    is_last = column + threads.tile_n >= threads.n
    end = jnp.where(is_last, threads.row_words, jnp.minimum(first + threads.words, threads.row_words))
    words = fill_up(words, threads.words + 3)

    @pl.loop(0, jnp.where(column < threads.n, jnp.clip(threads.m - row, 0, numbers.shape[0]), 0))
    def _(i):
        targets.partials[tile, row + i] = summaries[i]
        for word in range(words.shape[1]):

            @pl.when(first + word < end)
            def _(word=word):
                targets.words[0, row + i, first + word] = words[i, word]
