"""Products of prepared weights with the tokens of several texts: `WeightKind`, the columns of `mma` being texts.

The weights are loaded and expanded as for one text. Only the operand beside them changes: column n of an instruction's
eight is the token of text n mod `columns`, a power of two, so that a lane has sums of two texts for each of its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    K_SLICE_LAYOUT,
    WARPS,
    lane_and_warp,
)
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step import part_sums
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import TEXT_SLICE_WORDS, WARPGROUPS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.part_sums import (
    BLOCK_ROWS,
    add_stages_of_warp,
    inline_stages,
    inline_sums,
    own_positions,
)
from bipolar_jax.kernels.sm90.decode_step.prepared_products import PreparedKind
from bipolar_jax.kernels.sm90.decode_step.token_bytes import store_codes
from bipolar_jax.kernels.sm90.prepared_weights.expansion import Expansion
from bipolar_jax.packing.fields import expand_part


class TextsKind(PreparedKind):
    """See `weight_ring.WeightKind`; slots are those of `PreparedKind`.

    Tokens are uint32 [K slices, texts, TEXT_SLICE_WORDS]; a text's sums of a part follow those of the text before.
    """

    @property
    def sums_type(self) -> Any:
        return plgpu.SMEM((WARPGROUPS, self.shape.texts * self.shape.max_rows), jnp.int32)

    @property
    def operand_type(self) -> Any:
        return plgpu.SMEM((self.shape.token_slices, self.shape.texts, TEXT_SLICE_WORDS), jnp.uint32)

    def store_token(self, operand, code_sums, warpgroup, k_slices, starts, k, half_steps, middle, text=0) -> None:
        """See `weight_ring.WeightKind`, but for the warpgroup's barrier: other warpgroups multiply it too."""
        shape, indices = self.shape, [lax.div(start, K_SLICE) for start in starts]
        numbers, turn = (k_slices, indices, starts, k, half_steps, middle), shape.warpgroups_of_text
        store_codes(operand, code_sums, warpgroup, *numbers, shape.a_format, self._token_layout, text, turn)

    def add_stages(self, total, words, terms, token, part_of_slice, valid) -> Int[Array, "1024"]:
        return add_stages(total, words, terms, token, part_of_slice, valid, self.shape, self._expansion)

    def add_sums(self, sums, total, start, block_stride: int) -> None:
        add_sums(sums, total, start, block_stride, self.shape)

    def take_sums(self, sums, start, count, text=0) -> Int[Array, "128"]:
        return part_sums.take(sums, text * self.shape.max_rows + start, count)


def _text_of_column(shape: LayersShape, column: int) -> int:
    return min(column % shape.columns, shape.texts - 1)


def _add_stages_twin(total, words, terms, token, part_of_slice, valid, shape, expansion):
    stages = words.shape[0]
    weights = expand_part(words[...], None if terms is None else terms[...])
    by_text = []
    for text in range(shape.texts):
        own_token = token.at[text, pl.ds(0, TEXT_SLICE_WORDS - 4)]
        own, active = own_positions(own_token, part_of_slice, valid, stages)
        sums = jnp.sum(weights * own.astype(jnp.int32)[:, None], axis=-1)
        sums = jnp.where(active[:, None], jnp.concatenate([sums] * (WARPS // stages)), 0)  # [warps, rows]
        by_text.append(sums.reshape(WARPS, 2, 2, 8).transpose(0, 3, 1, 2))
    plgpu.commit_smem()  # for the race detector, see `part_sums`
    by_column = [by_text[_text_of_column(shape, column)] for column in range(8)]
    by_lane = jnp.stack(by_column, axis=2).reshape(WARPS, 8, 4, 2, 2, 2)  # warps, r, q, c, b, p
    return total + by_lane.transpose(0, 1, 2, 4, 5, 3).reshape(-1)


@with_twin(_add_stages_twin)
def add_stages(
    total: Int[Array, "1024"],
    words: Any,
    terms: Any,
    token: Any,
    part_of_slice: Int[Array, ""],
    valid: Any,
    shape: LayersShape,
    expansion: Expansion,
) -> Int[Array, "1024"]:
    """Adds a load's products to the sums of a warpgroup's warps.

    Args:
      token: shared memory, uint32 [texts, TEXT_SLICE_WORDS]: the K slice that the stages are out of.
      total, words, terms, part_of_slice, valid, expansion: as of `part_sums.add_stages`.
      shape: of the layers.
    """
    stages = words.shape[0]

    def of_warp(total, pointers, part_of_slice, valid):
        words, token, *terms = pointers
        own = [words, token_of_lane(token, shape), *terms]
        return add_stages_of_warp(total, own, part_of_slice, valid, stages, expansion, one_token=False)

    return inline_stages(of_warp, total, words, terms, token, part_of_slice, valid, K_SLICE_LAYOUT)


def _add_sums_twin(sums, total, start, block_stride, shape):
    # warps, r, q, b, p, c; any warp's sum is in all lanes of a column's text
    by_lane = total.reshape(WARPS, 8, 4, 2, 2, 2)
    for text in range(shape.texts):
        by_row = jnp.sum(by_lane[:, :, text // 2, :, :, text % 2], axis=0).transpose(1, 2, 0)  # b, p, r
        for block in range(2):
            first = text * shape.max_rows + start + block * block_stride
            sums[pl.ds(first, BLOCK_ROWS)] = by_row[block].reshape(-1)


@with_twin(_add_sums_twin)
def add_sums(
    sums: Any, total: Int[Array, "1024"], start: Int[Array, ""], block_stride: int, shape: LayersShape
) -> None:
    """sums[max_rows t + start + block_stride b + i] += the warpgroup's sum of text t, row 16 b + i of the part.

    Args:
      sums: shared memory, int32 [texts * max_rows], cleared.
      total: as `add_stages` returns it.
      shape: of the layers.
    """
    of_warp = functools.partial(add_sums_of_warp, block_stride=block_stride, shape=shape)
    inline_sums(of_warp, sums, total, start, K_SLICE_LAYOUT)


# Below: for use within `plgpu.inline_mgpu`.


def token_of_lane(token: Pointer, shape: LayersShape) -> Pointer:
    """The K slice of the text that is the lane's column of the operand: lane 4 n + q has column n."""
    lane, _ = lane_and_warp()
    text = ptx.bits_of(ptx.shift_right(lane, 2), shape.columns - 1)
    if shape.texts < shape.columns:
        text = ptx.smaller(text, shape.texts - 1)
    return ptx.advance(token, ptx.times(text, 4 * TEXT_SLICE_WORDS))


def add_sums_of_warp(
    sums: Pointer, total: Sequence[Value], start: Value, block_stride: int, shape: LayersShape
) -> None:
    """The thread's part of `add_sums`: number 4 b + 2 p + c of lane 4 r + q is of row 16 b + 8 p + r, column 2 q + c.

    Columns repeat the texts: of two texts each q adds one of the four (b, p), of more q and q + 2 one b each.
    """
    lane, _ = lane_and_warp()
    row = ptx.plus(start, ptx.shift_right(lane, 2))
    if shape.columns == 2:
        half, first_text = ptx.bits_of(lane, 1), ptx.int32(0)
        numbers = [
            [ptx.choose(ptx.equal(half, 1), total[4 * b + 2 + c], total[4 * b + c]) for c in range(2)] for b in range(2)
        ]
        halves = [(ptx.times(half, 8), numbers)]
    else:
        first_text = ptx.times(ptx.bits_of(lane, 1), 2)
        halves = [
            (ptx.int32(8 * p), [[total[4 * b + 2 * p + c] for c in range(2)] for b in range(2)]) for p in range(2)
        ]
    block = ptx.bits_of(ptx.shift_right(lane, 1), 1)
    row = ptx.plus(row, ptx.times(block, block_stride))
    for row_of_half, numbers in halves:
        for c in range(2):
            text = ptx.plus(first_text, c)
            pointer = ptx.advance_far(sums, ptx.plus(ptx.plus(row, row_of_half), ptx.times(text, shape.max_rows)), 4)
            number = ptx.choose(ptx.equal(block, 1), numbers[1][c], numbers[0][c])
            if shape.texts < shape.columns:
                with ptx.when(ptx.less(text, shape.texts)):
                    ptx.add_shared(pointer, number)
            else:
                ptx.add_shared(pointer, number)
