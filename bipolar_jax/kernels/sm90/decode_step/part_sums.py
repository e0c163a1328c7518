"""What the warps of a warpgroup do with parts of prepared weights: expand, multiply, and add up their sums.

Numbers of a part's 32 rows lie over the threads of a warp as `mma` returns them: number 4 b + 2 p + c of lane 4 r + q
belongs to row 16 b + 8 p + r. All columns of the token's operand are the token, so that all q and c have the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int, Num

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import as_integer, choose
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    K_SLICE_LAYOUT,
    SPLAT,
    VECTOR,
    WARPS,
    as_array,
    as_vector,
    lane_and_warp,
    numbers_of,
    scalar_of,
    thread_index,
)
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import WARPGROUPS
from bipolar_jax.kernels.sm90.decode_step.group_sums import multiply_codes, sums_are_scaled
from bipolar_jax.kernels.sm90.decode_step.token_bytes import SEGMENT_WORDS, positions_of, segment_bytes
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion
from bipolar_jax.packing.fields import CHUNK_WORDS, PART_ROWS, STAGE, STEPS, WORDS_PER_VECTOR, expand_part

BLOCK_ROWS = PART_ROWS // 2
_SUMS = K_SLICE  # of a warpgroup: eight a thread, in the layout of a K slice


def zeros() -> Int[Array, "1024"]:
    """Sums to begin a part with."""
    return plgpu.layout_cast(jnp.zeros(_SUMS, jnp.int32), K_SLICE_LAYOUT)


def own_positions(
    token: Any, part_of_slice: Int[Array, ""], valid: Any, stages: int, numbers_of_words: Callable = positions_of
) -> tuple[Int[Array, "stages positions"], Bool[Array, " warps"]]:
    """The token's numbers beside a load of `stages`, and which warps multiply them, in jnp."""
    # What is beyond K is not this warpgroup's to read.
    nothing = jnp.zeros(token.shape, token.dtype)
    numbers = numbers_of_words(token[...] if valid is None else choose(valid, lambda: token[...], lambda: nothing))
    active = jnp.arange(WARPS) // stages == part_of_slice % max(1, WARPS // stages)
    own = lax.dynamic_slice_in_dim(numbers, part_of_slice * stages, stages)
    return own, active if valid is None else active & valid


def sums_by_warp(sums: Int[Array, "stages *numbers"], active: Bool[Array, " warps"]) -> Int[Array, "warps *numbers"]:
    """Numbers of a load's stages, of the warps that multiply them, in jnp."""
    stages = sums.shape[0]
    by_warp = jnp.concatenate([sums] * (WARPS // stages)) if stages <= WARPS else sum(jnp.split(sums, stages // WARPS))
    return jnp.where(active.reshape(-1, *[1] * (sums.ndim - 1)), by_warp, 0)


def _add_stages_twin(total, words, terms, token, part_of_slice, valid, expansion):
    weights = expand_part(words[...], None if terms is None else terms[...])
    own, active = own_positions(token, part_of_slice, valid, words.shape[0])
    # The race detector sees no order between these reads and the next TMA write, which waits for `release`.
    plgpu.commit_smem()
    sums = sums_by_warp(jnp.sum(weights * own.astype(jnp.int32)[:, None], axis=-1), active)  # [warps, rows]
    by_lane = sums.reshape(WARPS, 2, 2, 8).transpose(0, 3, 1, 2)[:, :, None, :, :, None]
    return total + jnp.broadcast_to(by_lane, (WARPS, 8, 4, 2, 2, 2)).reshape(-1)


@with_twin(_add_stages_twin)
def add_stages(
    total: Int[Array, "1024"],
    words: Any,
    terms: Any,
    token: Any,
    part_of_slice: Int[Array, ""],
    valid: Any,
    expansion: Expansion,
) -> Int[Array, "1024"]:
    """Adds a load's products to the sums of a warpgroup's warps.

    Args:
      total: eight sums a thread, of its warp.
      words: shared memory, uint32 [stages, bits, WORDS_PER_VECTOR].
      terms: likewise, uint32 [stages, chunks, CHUNK_WORDS]; or None.
      token: likewise, uint32 [SLICE_WORDS]: the K slice that the stages are out of.
      part_of_slice: which `stages` of the slice's eight they are.
      valid: whether there are such stages; None if it is known.
      expansion: how fields become bytes.
    """
    stages = words.shape[0]

    def of_warp(total, pointers, part_of_slice, valid):
        return add_stages_of_warp(total, pointers, part_of_slice, valid, stages, expansion)

    return inline_stages(of_warp, total, words, terms, token, part_of_slice, valid, K_SLICE_LAYOUT)


def inline_stages(
    of_warp: Callable[[list[Value], list[Pointer], Value, list[Value]], list[Value]],
    total: Num[Array, " sums"],
    words: Any,
    terms: Any,
    token: Any,
    part_of_slice: Int[Array, ""],
    valid: Any,
    layout: plgpu.Layout,
) -> Num[Array, " sums"]:
    """Calls a thread's part of a function such as `add_stages`.

    Args:
      of_warp: of_warp(total, pointers, part_of_slice, valid), of the thread's numbers, of pointers to words, the token
        and, with groups, terms, and of no or one word.
      total, words, terms, token, part_of_slice, valid: as of `add_stages`.
      layout: of the total.
    """
    refs = [words, token] if terms is None else [words, token, terms]
    numbers = [part_of_slice] if valid is None else [part_of_slice, as_integer(valid)]

    @plgpu.inline_mgpu(
        arg_types=(layout, *[plgpu.RefType()] * len(refs), *[SPLAT] * len(numbers)),
        return_type=plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=layout),
    )
    def inline(_, values, *arrays):
        pointers = [ptx.pointer(ref, ptx.SHARED) for ref in arrays[: len(refs)]]
        part_of_slice, *valid = map(scalar_of, arrays[len(refs) :])
        sums = of_warp(numbers_of(values), pointers, part_of_slice, valid)
        return as_array(sums, total.shape, layout, is_signed=True if total.dtype == jnp.int32 else None)

    return inline(total, *refs, *map(jnp.int32, numbers))


def inline_sums(
    of_warp: Callable[[Pointer, list[Value], Value], None],
    sums: Any,
    total: Int[Array, " sums"],
    start: Int[Array, ""],
    layout: plgpu.Layout,
) -> None:
    """Calls a thread's part of a function such as `add_sums`.

    Args:
      of_warp: of_warp(sums, total, start), of a pointer, the thread's numbers and a word.
      sums, total, start: as of `add_sums`.
      layout: of the total.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, SPLAT))
    def inline(_, sums, total, start):
        of_warp(ptx.pointer(sums, ptx.SHARED), numbers_of(total), scalar_of(start))

    inline(sums, total, jnp.int32(start))


def _clear_twin(sums):
    del sums  # `add_sums` stores there


@with_twin(_clear_twin)
def clear(sums: Any) -> None:
    """Sets sums to zero: int32 [rows] in shared memory."""
    (size,) = sums.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inline(_, sums):
        thread, first = thread_index(), ptx.pointer(sums, ptx.SHARED)

        def store_zero(index: Value, carry: list[Value]) -> list[Value]:
            element = ptx.plus(ptx.times(index, WARPGROUP), thread)
            with ptx.when(ptx.less(element, size)):
                ptx.store(ptx.advance_far(first, element, 4), [ptx.int32(0)])
            return carry

        ptx.repeat(-(-size // WARPGROUP), [], store_zero)

    inline(sums)


def _add_sums_twin(sums, total, start, block_stride):
    by_row = jnp.sum(total.reshape(WARPS, 8, 4, 2, 2, 2)[:, :, 0, :, :, 0], axis=0).transpose(1, 2, 0)
    for block in range(2):
        sums[pl.ds(start + block * block_stride, BLOCK_ROWS)] = by_row[block].reshape(-1)


@with_twin(_add_sums_twin)
def add_sums(sums: Any, total: Int[Array, "1024"], start: Int[Array, ""], block_stride: int) -> None:
    """sums[start + block_stride b + i] += the warpgroup's sum for row 16 b + i of the part, i below 16.

    Args:
      sums: shared memory, int32 [rows], cleared.
      total: as `add_stages` returns it.
    """
    of_warp = functools.partial(add_sums_of_warp, block_stride=block_stride)
    inline_sums(of_warp, sums, total, start, K_SLICE_LAYOUT)


def _take_twin(sums, start, count):
    return jnp.where(lax.iota(jnp.int32, WARPGROUP) < count, jnp.sum(sums[:, pl.ds(start, WARPGROUP)], axis=0), 0)


@with_twin(_take_twin)
def take(sums: Any, start: Int[Array, ""] | int, count: int) -> Int[Array, "128"]:
    """The sums over warpgroups of the first `count` of 128 rows from `start` on, which it clears; 0 for the others.

    Args:
      sums: shared memory, int32 [warpgroups, rows].
    """
    rows = sums.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.int32, layout=VECTOR),
    )
    def inline(_, sums, start):
        thread = thread_index()
        mine = ptx.advance_far(ptx.pointer(sums, ptx.SHARED), ptx.plus(scalar_of(start), thread), 4)
        pointers = [ptx.advance(mine, 4 * rows * warpgroup) for warpgroup in range(WARPGROUPS)]
        words = ptx.update_if(
            ptx.less(thread, count), [ptx.int32(0)] * WARPGROUPS, lambda: [ptx.take_shared(p) for p in pointers]
        )
        total = ptx.plus(ptx.plus(words[0], words[1]), ptx.plus(words[2], words[3]))
        return as_vector(total, jnp.int32)

    return inline(sums, jnp.int32(start))


# Below: for use within `plgpu.inline_mgpu`.


def add_stages_of_warp(
    total: list[Value],
    pointers: Sequence[Pointer],
    part_of_slice: Value,
    valid: Sequence[Value],
    stages: int,
    expansion: Expansion,
    one_token: bool = True,
) -> list[Value]:
    """The thread's numbers of `add_stages`; `valid` is empty or one word. See `group_sums` for `one_token`."""

    def multiply(sums: list[Value], words: Pointer, terms: list[Pointer], token: Pointer, lane: Value) -> list[Value]:
        return _multiply_stage(sums, words, terms, token, lane, expansion, one_token)

    return add_own_stages(total, pointers, part_of_slice, valid, stages, expansion, multiply)


def add_own_stages(
    total: list[Value],
    pointers: Sequence[Pointer],
    part_of_slice: Value,
    valid: Sequence[Value],
    stages: int,
    expansion: Expansion,
    multiply: Callable[[list[Value], Pointer, list[Pointer], Pointer, Value], list[Value]],
    locate: Callable[[Pointer, Value, Value], Pointer] | None = None,
) -> list[Value]:
    """The thread's numbers after all stages of a load that are its warp's: multiply(sums, words, terms, token, lane).

    Other arguments are those of `multiply_own_stage`, and of `add_stages_of_warp`.
    """
    words_bytes, chunks_bytes = 4 * expansion.bits * WORDS_PER_VECTOR, 4 * expansion.chunks * CHUNK_WORDS

    def multiply_stages(words: Pointer, terms: list[Pointer], token: Pointer, lane: Value) -> list[Value]:
        sums = total
        # Of twice as many stages as warps, the warp's second lies behind the first of all; its token too.
        for first in range(0, stages, WARPS):
            own = [ptx.advance(pointer, first * chunks_bytes) for pointer in terms]
            stage = ptx.advance(words, first * words_bytes), own, ptx.advance(token, first * STAGE)
            sums = multiply(sums, *stage, lane)
        return sums

    options = {"bits": expansion.bits, "terms_bytes": chunks_bytes, "multiply": multiply_stages, "locate": locate}
    return multiply_own_stage(total, pointers, part_of_slice, valid, stages, **options)


def multiply_own_stage(
    total: list[Value],
    pointers: Sequence[Pointer],
    part_of_slice: Value,
    valid: Sequence[Value],
    stages: int,
    bits: int,
    terms_bytes: int,
    multiply: Callable[[Pointer, list[Pointer], Pointer, Value], list[Value]],
    locate: Callable[[Pointer, Value, Value], Pointer] | None = None,
) -> list[Value]:
    """What `multiply` makes of the total where this warp has a stage of the load, else the total.

    Args:
      total: of the thread.
      pointers: of words, the token's slice and, with groups, terms.
      part_of_slice, valid, stages: as of `add_stages_of_warp`.
      bits: of the codes.
      terms_bytes: of the terms of a stage.
      multiply: multiply(words, terms, token, lane), of the warp's stage; the token is the lane's segment.
      locate: locate(token, stage, lane) finds the lane's numbers in the token's slice; None those of `token_bytes`.
    """
    lane, warp = lane_and_warp()
    words, token, *terms = pointers
    stage = ptx.bits_of(warp, stages - 1)
    words = ptx.advance(words, ptx.times(stage, 4 * bits * WORDS_PER_VECTOR))
    terms = [ptx.advance(pointer, ptx.times(stage, terms_bytes)) for pointer in terms]
    stage_of_slice = ptx.plus(ptx.times(part_of_slice, stages), stage)
    token = (locate or _segment)(token, stage_of_slice, lane)
    conditions = [ptx.equal(word, 1) for word in valid]
    turns = WARPS // stages
    if turns > 1:
        turn = ptx.shift_right(warp, stages.bit_length() - 1)
        conditions.append(ptx.equal(turn, ptx.bits_of(part_of_slice, turns - 1)))

    def multiplied() -> list[Value]:
        return multiply(words, terms, token, lane)

    if not conditions:
        return multiplied()
    condition = conditions[0] if len(conditions) == 1 else ptx.bits_of(*conditions)
    return ptx.update_if(condition, total, multiplied)


def _segment(token: Pointer, stage_of_slice: Value, lane: Value) -> Pointer:
    return ptx.advance(token, ptx.plus(ptx.times(stage_of_slice, STAGE), segment_bytes(stage_of_slice, lane)))


def load_segment(token: Pointer) -> list[Value]:
    """The words of a lane's segment of a stage: 2 s + h of step s and half h."""
    return ptx.load(token, SEGMENT_WORDS // 2) + ptx.load(ptx.advance(token, 2 * SEGMENT_WORDS), SEGMENT_WORDS // 2)


def _multiply_stage(
    total: list[Value],
    words: Pointer,
    terms: list[Pointer],
    token: Pointer,
    lane: Value,
    expansion: Expansion,
    one_token: bool,
) -> list[Value]:
    """Adds a warp's products of one stage; each column of the tensor core's operand is the token, or one of several."""
    if sums_are_scaled(expansion):
        return multiply_codes(total, words, *terms, load_segment(token), lane, expansion, one_token)
    fields = [expansion.load_fields(words, lane, half) for half in range(HALVES)]
    x = load_segment(token)
    halves = range(HALVES) if expansion.chunks > 1 else range(1)
    group_terms = [[chunk for ref in terms for chunk in expansion.load_terms(ref, lane, half)] for half in halves]
    for step in range(STEPS):
        half, own_step = divmod(step, HALF_STEPS)
        own_terms = group_terms[min(half, len(group_terms) - 1)]
        fragments = expansion.fragments(fields[half][own_step], own_terms, own_step)
        tokens = x[2 * step : 2 * step + 2]
        total = [
            number
            for block in range(2)
            for number in ptx.multiply_add_byte_tiles(
                fragments[4 * block : 4 * block + 4], tokens, total[4 * block : 4 * block + 4]
            )
        ]
    return total


def add_sums_of_warp(sums: Pointer, total: list[Value], start: Value, block_stride: int) -> None:
    """The thread's part of `add_sums`: lane 4 r + 2 b + p adds row 16 b + 8 p + r."""
    lane, _ = lane_and_warp()
    block, half = ptx.bits_of(ptx.shift_right(lane, 1), 1), ptx.bits_of(lane, 1)
    by_block = [ptx.choose(ptx.equal(half, 1), total[4 * i + 2], total[4 * i]) for i in range(2)]
    row = ptx.plus(ptx.plus(ptx.times(block, block_stride), ptx.times(half, 8)), ptx.shift_right(lane, 2))
    pointer = ptx.advance_far(sums, ptx.plus(start, row), 4)
    ptx.add_shared(pointer, ptx.choose(ptx.equal(block, 1), by_block[1], by_block[0]))
