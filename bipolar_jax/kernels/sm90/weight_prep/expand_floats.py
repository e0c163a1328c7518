"""Prepared weights expanded to rows of 16-bit floats, or bytes, in memory, for prompts.

The values of integer groups, or of the format, are exact in bfloat16 and float16; XLA's dot multiplies them, and the
columns' scales follow. One pass reads the fields and writes 16 bits a weight.

A warp takes a part of a stage: a lane makes the values of its registers, whose positions are those of the tokens' bytes
(`packing.fields`). Where these are interleaved, the four lanes of a row transpose the bytes of their codes, so that
each has eight elements that follow each other, and stores 16 bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.arithmetic.recovery import holds_values
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel, with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, lane_and_warp, scalar_of
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion, StepWords
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import (
    CHUNK_WORDS,
    OFFSET_BIAS,
    PART_ROWS,
    PARTS,
    STAGE,
    TILE_ROWS,
    WORDS_PER_VECTOR,
    expand_tile,
)

_STAGES = 2  # of a block, whose fields a thread loads at once
_RUN = PART_ROWS // 2  # rows of a block of a part
_HALF_TILE = TILE_ROWS // 2
_EVERY_BYTE, _SIGN = 0x01010101, 128


def expand_floats(
    w: PreparedArray, dtype: jnp.dtype, *, interpret: plgpu.InterpretGPUParams | None = None
) -> Float[Array, "n padded_k"]:
    """The integer values of the weights, exactly, by column; from K on to whole stages any finite numbers.

    Args:
      w: [k, n]; gated or not. Of float groups the values are those of the format, without their scales.
      dtype: bfloat16 or float16.
      interpret: parameters of interpret mode, for tests on a CPU.
    """
    terms = [] if w.float_terms is not None or w.terms is None else [w.terms]
    expansion = FloatExpansion(w.format, w.chunks if terms else 0, FLOATS[PTX_TYPES[jnp.dtype(dtype).name]])
    return _expanded(w, terms, expansion, jnp.dtype(dtype), interpret)


def expand_bytes(w: PreparedArray, *, interpret: plgpu.InterpretGPUParams | None = None) -> Int8[Array, "n padded_k"]:
    """The values of the format, or signed codes where values do not fit a byte, by column; arguments as above."""
    return _expanded(w, [], ByteExpansion(w.format), jnp.dtype(jnp.int8), interpret)


def _expanded(w: PreparedArray, terms, expansion: FloatExpansion | ByteExpansion, dtype, interpret) -> Array:
    rows = FloatRows(expansion, w.row_sums.shape[-2], w.words.shape[2], w.gated, w.natural_order)
    return expanded_rows(rows, [w.words, *terms], w.words.shape[0], dtype, interpret)


def expanded_rows(
    rows: FloatRows, sources: list[Array], tiles: int, dtype: jnp.dtype, interpret: plgpu.InterpretGPUParams | None
) -> Array:
    """The rows [n, stages * STAGE] of an expansion.

    Args:
      rows: the static side.
      sources: the weights' words, and their terms if there are any.
      tiles: of the weights.
      dtype: of the result.
      interpret: parameters of interpret mode.
    """
    stages = rows.stages

    def kernel(*refs):
        *sources, out = refs
        _expand_block(rows, lax.axis_index("tile"), lax.axis_index("slice") * _STAGES, sources, out)

    return launch_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows.n, stages * STAGE), dtype),
        grid=(tiles, -(-stages // _STAGES)),
        grid_names=("tile", "slice"),
        kernel_name="expand_bytes" if dtype == jnp.int8 else rows.kernel_name,
        interpret=interpret,
        # No barriers: threads share no memory.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*sources)


@dataclasses.dataclass(frozen=True)
class ByteExpansion:
    """How fields become signed bytes; as `FloatExpansion`, without groups.

    Attributes:
      format: of the codes.
    """

    format: BipolarFormat

    @property
    def fields(self) -> Expansion:
        """How registers of codes are made of fields."""
        return Expansion(self.format.bits, 0)

    def load_terms(self, terms: None, lane: Value, half: int) -> list[list[None]]:
        """No terms."""
        return [[None] * 4]

    def values(self, codes: Value, terms: None) -> list[Value]:
        """2 u - W in every byte: no byte of 2 u + 128 - W carries into the next; or u - 128."""
        if holds_values(self.format):
            codes = ptx.plus(ptx.plus(codes, codes), (_SIGN - self.format.max_value) * _EVERY_BYTE)
        return [ptx.flip_bits(codes, _SIGN * _EVERY_BYTE)]


@dataclasses.dataclass(frozen=True)
class FloatRows:
    """The static side of an expansion.

    Attributes:
      expansion: of fields to floats, or to bytes.
      n: columns of the weights, rows of the result.
      stages: of K.
      gated: whether the columns are gates and as many values.
      natural_order: whether positions are elements.
    """

    expansion: FloatExpansion | ByteExpansion
    n: int
    stages: int
    gated: bool
    natural_order: bool

    kernel_name: ClassVar[str] = "expand_floats"

    @property
    def size(self) -> int:
        """Bytes of an element of the result."""
        return 1 if isinstance(self.expansion, ByteExpansion) else 2

    @property
    def limit(self) -> int:
        """Columns of either block's kind: all, or the gates."""
        return self.n // 2 if self.gated else self.n

    def first_column(self, tile, block: int):
        """The first of the columns of a tile's block, without those of gates before values; the tile may be traced."""
        return tile * _HALF_TILE if self.gated else tile * TILE_ROWS + block * _HALF_TILE

    def expand_block(self, tile: Value, first: Value, words: Value, terms: list[Value], out: Value) -> None:
        """Expands _STAGES stages of a tile; what is beyond K or n is not stored.

        Args:
          tile: index of the tile.
          first: of the stages.
          words: uint32 [tiles, PARTS, stages, bits, WORDS_PER_VECTOR] in global memory.
          terms: what `load_terms` takes, likewise.
          out: [n, stages * STAGE], likewise.
        """
        (lane, warp), fields = lane_and_warp(), self.expansion.fields
        ragged = self.stages % _STAGES != 0
        loaded = []
        for turn in range(_STAGES):
            stage = ptx.plus(first, turn)
            inside = ptx.less(stage, self.stages) if ragged else None
            stage = ptx.smaller(stage, self.stages - 1) if ragged else stage
            index = ptx.plus(ptx.times(ptx.plus(ptx.times(tile, PARTS), warp), self.stages), stage)
            mine = ptx.advance_far(ptx.pointer(words, ptx.GLOBAL), index, 4 * fields.bits * WORDS_PER_VECTOR)
            by_half = [
                (fields.load_fields(mine, lane, half), self.load_terms(terms, tile, stage, warp, lane, half))
                for half in range(HALVES)
            ]
            loaded.append((stage, inside, by_half))
        for stage, inside, by_half in loaded:
            for half, (words_of_steps, group_terms) in enumerate(by_half):
                for step in range(HALF_STEPS):
                    values = self._values(words_of_steps[step], group_terms, step, lane)
                    at = ptx.plus(ptx.times(stage, STAGE), 32 * (HALF_STEPS * half + step))
                    self._store(values, tile, warp, lane, at, inside, out)

    def load_terms(
        self, terms: list[Value], tile: Value, stage: Value, warp: Value, lane: Value, half: int
    ) -> list[list[Any]]:
        """Terms of a lane's four rows, for each chunk of half a stage, as the expansion has them.

        Args:
          terms: uint32 [tiles, PARTS, stages, chunks, CHUNK_WORDS] in global memory, if there are any.
          tile, stage, warp, lane, half: what the thread expands.
        """
        if not terms:
            return self.expansion.load_terms(None, lane, half)
        index = ptx.plus(ptx.times(ptx.plus(ptx.times(tile, PARTS), warp), self.stages), stage)
        stage_bytes = 4 * self.expansion.fields.chunks * CHUNK_WORDS
        own = ptx.advance_far(ptx.pointer(terms[0], ptx.GLOBAL), index, stage_bytes)
        return self.expansion.load_terms(own, lane, half)

    def numbers(self, values: Array, terms, row, count: int, stage) -> Array:
        """What is written of the values of `count` columns from `row` on, in jnp."""
        del terms, row, count, stage
        return values

    def _values(self, words: StepWords, terms, step: int, lane: Value) -> list[list[Value]]:
        """Words of values, first those of the first half of the step, for each of the lane's four rows."""
        rows = []
        for row in range(4):
            block, low_row = divmod(row, 2)
            words_of_row = []
            for half in range(2):
                codes = self.expansion.fields.codes(words, 4 * block + 2 * half + low_row)
                if not self.natural_order:
                    codes = transposed_bytes(codes, lane)
                words_of_row += self.expansion.values(codes, terms[(2 * step + half) * len(terms) // 4][row])
            rows.append(words_of_row)
        return rows

    def _store(self, values, tile: Value, warp: Value, lane: Value, at: Value, inside: Value | None, out) -> None:
        quad = ptx.bits_of(lane, 3)
        for row, (words, column) in enumerate(zip(values, self._columns_of_kind(tile, warp, lane), strict=True)):
            block = row // 2
            conditions = [] if inside is None else [inside]
            if self.limit % (_HALF_TILE if self.gated else TILE_ROWS):
                conditions.append(ptx.less(column, self.limit))
            if self.gated:
                column = ptx.plus(column, block * self.limit)
            start = ptx.advance_far(ptx.pointer(out, ptx.GLOBAL), column, self.stages * STAGE * self.size)
            with contextlib.ExitStack() as stack:
                for condition in conditions:
                    stack.enter_context(ptx.when(condition))
                if self.natural_order:  # four elements of either half of the step
                    for half in range(2):
                        position = ptx.plus(ptx.plus(at, 16 * half), ptx.times(quad, 4))
                        own = words[self.size * half : self.size * (half + 1)]
                        ptx.store(ptx.advance(start, ptx.times(position, self.size)), own)
                else:
                    position = ptx.plus(at, ptx.times(quad, 8))
                    ptx.store(ptx.advance(start, ptx.times(position, self.size)), words)

    def columns(self, tile: Value, warp: Value, lane: Value) -> list[Value]:
        """The columns of a lane's four rows; they may be beyond n, or gates beyond the last."""
        columns = self._columns_of_kind(tile, warp, lane)
        if not self.gated:
            return columns
        return [ptx.plus(column, row // 2 * self.limit) for row, column in enumerate(columns)]

    def _columns_of_kind(self, tile: Value, warp: Value, lane: Value) -> list[Value]:
        """`columns`, values without the gates before them."""
        columns = []
        for row in range(4):
            block, low_row = divmod(row, 2)
            column = ptx.plus(ptx.times(warp, _RUN), ptx.plus(ptx.shift_right(lane, 2), 8 * low_row))
            columns.append(ptx.plus(column, self.first_column_of(tile, block)))
        return columns

    def first_column_of(self, tile: Value, block: int) -> Value:
        """`first_column` for threads."""
        if self.gated:
            return ptx.times(tile, _HALF_TILE)
        return ptx.plus(ptx.times(tile, TILE_ROWS), block * _HALF_TILE)


def transposed_bytes(word: Value, lane: Value) -> Value:
    """Byte t of lane 4 r + i is byte i of lane 4 r + t's word."""
    # Rows of pairs of lanes, then of pairs of pairs.
    odd, high = (ptx.equal(ptx.bits_of(lane, bit), bit) for bit in (1, 2))
    selector = ptx.choose(odd, ptx.int32(0x3715), ptx.int32(0x6240))
    word = ptx.pick_bytes(word, ptx.exchange(word, 1), selector)
    selector = ptx.choose(high, ptx.int32(0x3276), ptx.int32(0x5410))
    return ptx.pick_bytes(word, ptx.exchange(word, 2), selector)


def _expand_block_twin(rows: FloatRows, tile, first, sources, out) -> None:
    words, *terms = sources
    max_value = rows.expansion.format.max_value
    for turn in range(_STAGES):
        stage = first + turn

        @when(stage < rows.stages)
        def _(stage=stage):
            grouped = isinstance(rows.expansion, FloatExpansion) and terms
            numbers = expand_tile(words[tile, :, stage], terms[0][tile, :, stage] if grouped else None)
            if not rows.natural_order:
                numbers = numbers.reshape(TILE_ROWS, -1, 8, 4).swapaxes(-1, -2).reshape(TILE_ROWS, STAGE)
            values = numbers - OFFSET_BIAS if grouped else 2 * numbers - max_value
            if out.dtype == jnp.int8 and not holds_values(rows.expansion.format):
                values = numbers - _SIGN
            for block in range(2):
                start = rows.first_column(tile, block)
                own = values[_HALF_TILE * block : _HALF_TILE * (block + 1)]
                filled = rows.limit % _HALF_TILE

                def store(count, start=start, own=own, block=block):
                    row = start + block * rows.limit if rows.gated else start
                    numbers = rows.numbers(own[:count], terms, row, count, stage)
                    out[pl.ds(row, count), pl.ds(stage * STAGE, STAGE)] = numbers.astype(out.dtype)

                when(start + _HALF_TILE <= rows.limit)(lambda store=store: store(_HALF_TILE))
                if filled:
                    is_last = (start < rows.limit) & (start + _HALF_TILE > rows.limit)
                    when(is_last)(lambda store=store, filled=filled: store(filled))


@with_twin(_expand_block_twin)
def _expand_block(rows: FloatRows, tile, first, sources, out) -> None:
    """`FloatRows.expand_block` on refs."""

    @plgpu.inline_mgpu(arg_types=(SPLAT, SPLAT, *[plgpu.RefType()] * (len(sources) + 1)))
    def inline(_, tile, first, *refs):
        words, *terms, out = refs
        rows.expand_block(scalar_of(tile), scalar_of(first), words, terms, out)

    inline(jnp.int32(tile), jnp.int32(first), *sources, out)
