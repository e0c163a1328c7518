"""Encodes a token's numbers, and stores the codes as `mma` reads them beside prepared weights, for one as signed bytes.

A stage of the token is 32 words: four segments of eight, one for each lane of four that share a row of the weights.
Lane q of a group multiplies words 2 s + h of its segment in step s, the bytes of positions 32 s + 16 h + 4 q onwards
(`packing.fields`). Of stages with an odd index segments 2 j and 2 j + 1 are exchanged: threads of a warp store bytes
of two neighbouring stages at once, and would meet in the same banks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int, Int8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import K_SLICE_LAYOUT, SPLAT, numbers_of, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.bit_planes import code_encoder, codes_of, low_bytes, store_code_sums
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import STAGES_PER_SLICE, WARPGROUPS
from bipolar_jax.packing import fields
from bipolar_jax.packing.fields import STAGE, STEPS, TokenOrder

_EVERY_BYTE = 0x01010101
_SEGMENTS, SEGMENT_WORDS = 4, 8  # of a stage
SLICE_WORDS = K_SLICE // 4
_SIGN = 128  # of a byte


def segment_bytes(stage: Value, lane: Value) -> Value:
    """Where a lane's segment of a stage is among the bytes of the stage."""
    segment = ptx.flip_bits(ptx.bits_of(lane, _SEGMENTS - 1), ptx.bits_of(stage, 1))
    return ptx.times(segment, 4 * SEGMENT_WORDS)


def positions_of(words: UInt32[Array, "256"]) -> Int8[Array, "stages positions"]:
    """The bytes of a slice by stage and position, in jnp."""
    numbers = lax.bitcast_convert_type(words, jnp.int8).reshape(STAGES_PER_SLICE // 2, 2, _SEGMENTS, STEPS, 2, 4)
    numbers = jnp.stack([numbers[:, 0], _exchanged(numbers[:, 1])], axis=1)
    return numbers.transpose(0, 1, 3, 4, 2, 5).reshape(STAGES_PER_SLICE, -1)


def words_of(numbers: Int8[Array, "1024"], order: TokenOrder) -> UInt32[Array, "256"]:
    """The inverse of `positions_of`, of elements."""
    numbers = fields.positions_of(numbers, order)
    numbers = numbers.reshape(STAGES_PER_SLICE // 2, 2, STEPS, 2, _SEGMENTS, 4).transpose(0, 1, 4, 2, 3, 5)
    numbers = jnp.stack([numbers[:, 0], _exchanged(numbers[:, 1])], axis=1)
    return lax.bitcast_convert_type(numbers.reshape(-1, 4), jnp.uint32)


def _exchanged(segments):
    return segments.reshape(-1, 2, STEPS, 2, 4)[:, ::-1].reshape(segments.shape)


class TokenLayout(Protocol):
    """Where the codes of a K slice lie in its words."""

    def words_of(
        self, codes: Int[Array, "1024"], inside: Bool[Array, "1024"], a_format: BipolarFormat
    ) -> UInt32[Array, "256"]:
        """The slice's words, in jnp; codes are 0 where they are not inside of K."""

    def arrange(
        self, thread: Value, words: Sequence[Value], inside: Value | None, a_format: BipolarFormat
    ) -> list[Value]:
        """What a thread stores of its eight codes, bytes of two words; threads may exchange words.

        They count as 0 unless they are inside of K; None if they are.
        """

    def store(self, target: Pointer, thread: Value, words: Sequence[Value]) -> None:
        """Stores what `arrange` returns to the words of the slice."""


@dataclasses.dataclass(frozen=True)
class ByteLayout:
    """`TokenLayout` of signed codes u - o, a byte each.

    Attributes:
      order: that positions follow, see `packing.fields`.
    """

    order: TokenOrder

    def words_of(self, codes, inside, a_format):
        signed = jnp.where(inside, codes - a_format.code_offset, 0)
        return words_of(signed.astype(jnp.int8), self.order)

    def arrange(self, thread, words, inside, a_format):
        signed = [signed_bytes(word, a_format) for word in words]
        if inside is not None:
            signed = [ptx.choose(inside, word, ptx.int32(0)) for word in signed]
        return signed if self.order == "bytes" else by_pair(thread, signed)

    def store(self, target, thread, words):
        (store_interleaved if self.order == "bytes" else store_by_pair)(target, thread, words)


def _store_codes_twin(
    operand, code_sums, warpgroup, k_slices, indices, starts, k, half_steps, middle, a_format, layout, text=None,
    turn=WARPGROUPS,
):  # fmt: skip
    del turn
    total = jnp.int32(0)
    for index, numbers, start in zip(indices, k_slices, starts, strict=True):
        codes = codes_of(numbers, start, k, half_steps, middle, a_format)
        total += jnp.sum(codes)

        @when(start < k)
        def _(index=index, codes=codes, start=start):
            words = layout.words_of(codes, start + lax.iota(jnp.int32, K_SLICE) < k, a_format)
            if text is None:
                operand[index] = words
            else:
                operand[index, text, pl.ds(0, SLICE_WORDS)] = words

    store_code_sums(code_sums, warpgroup, total)


@with_twin(_store_codes_twin)
def store_codes(
    operand: Any,
    code_sums: Any,
    warpgroup: Int[Array, ""],
    k_slices: Sequence[Float[Array, "1024"]],
    indices: Sequence[Int[Array, ""]],
    starts: Sequence[Int[Array, ""]],
    k: int,
    half_steps: Float[Array, ""],
    middle: Float[Array, ""],
    a_format: BipolarFormat,
    layout: TokenLayout,
    text: Int[Array, ""] | int | None = None,
    turn: int = WARPGROUPS,
) -> None:
    """Encodes K slices, and stores their codes and every warp's sum of them.

    Args:
      operand: shared memory, uint32 [K slices, SLICE_WORDS]; of several texts [K slices, texts, SLICE_WORDS or more].
      code_sums, warpgroup, k_slices, starts, half_steps, middle, a_format: as of `bit_planes.store_bit_planes`.
      indices: of the slices in `operand`: of one text warpgroup, warpgroup + 4 and so on.
      k: the contracted size, a multiple of 8. From there on zeros are stored, to the end of a stage and no further:
        weights of a group that ends there are not zero in all of the stage.
      layout: of the codes.
      text: whose token, or None if there is one.
      turn: warpgroups that take a token's slices in turn.
    """
    count, slice_bytes = len(k_slices), 4 * math.prod(operand.shape[1:])
    texts, operand_words = [] if text is None else [jnp.int32(text)], operand.shape[-1]
    types = [plgpu.RefType(), plgpu.RefType(), SPLAT, SPLAT, SPLAT]
    types += [K_SLICE_LAYOUT] * count + [SPLAT] * (2 * count + len(texts))

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def inline(_, operand, code_sums, warpgroup, half_steps, middle, *arrays):
        thread, total = thread_index(), ptx.int32(0)
        encode = code_encoder(scalar_of(half_steps), scalar_of(middle), a_format)
        first_word = ptx.pointer(operand, ptx.SHARED)
        slices, indices, starts = (arrays[i * count : (i + 1) * count] for i in range(3))
        if texts:
            first_word = ptx.advance(first_word, ptx.times(scalar_of(arrays[-1]), 4 * operand_words))
        for i, (numbers, index, start) in enumerate(zip(slices, indices, starts, strict=True)):
            codes = [encode(number) for number in numbers_of(numbers)]
            words = [low_bytes(codes[:4]), low_bytes(codes[4:])]
            if (i + 1) * turn * K_SLICE <= k:  # the slices of all warpgroups
                for word in words:
                    total = ptx.add_bytes(word, total, signed=False)
                target = ptx.advance(first_word, ptx.times(scalar_of(index), slice_bytes))
                layout.store(target, thread, layout.arrange(thread, words, None, a_format))
                continue
            stored = inside = ptx.less(ptx.plus(scalar_of(start), ptx.times(thread, 8)), k)
            for word in words:
                total = ptx.choose(inside, ptx.add_bytes(word, total, signed=False), total)
            arranged = layout.arrange(thread, words, inside if k % STAGE else None, a_format)
            if k % STAGE:
                stored = ptx.less(ptx.plus(scalar_of(start), ptx.times(thread, 8)), -(-k // STAGE) * STAGE)
            with ptx.when(stored):
                target = ptx.advance(first_word, ptx.times(scalar_of(index), slice_bytes))
                layout.store(target, thread, arranged)
        store_code_sums(code_sums, scalar_of(warpgroup), total)

    inline(
        operand,
        code_sums,
        jnp.int32(warpgroup),
        half_steps,
        middle,
        *k_slices,
        *map(jnp.int32, indices),
        *map(jnp.int32, starts),
        *texts,
    )


# Below: for use within `plgpu.inline_mgpu`.


def signed_bytes(codes: Value, a_format: BipolarFormat) -> Value:
    """u - o in every byte, of codes u: u + 128 - o is at most 255, and its sign bit is the complement of the sign."""
    if a_format.code_offset != _SIGN:
        codes = ptx.plus(codes, (_SIGN - a_format.code_offset) * _EVERY_BYTE)
    return ptx.flip_bits(codes, _SIGN * _EVERY_BYTE)


def store_interleaved(target: Pointer, thread: Value, words: Sequence[Value]) -> None:
    """Stores a thread's eight bytes of a slice, as byte i of eight words: position 4 j + i is element 8 i + j.

    Args:
      target: of the slice.
      thread: with elements 8 thread onwards.
      words: bytes of the elements, signed.
    """
    stage, step = ptx.shift_right(thread, 4), ptx.bits_of(ptx.shift_right(thread, 2), STEPS - 1)
    at = ptx.plus(ptx.plus(ptx.times(stage, 128), ptx.times(step, 8)), ptx.bits_of(thread, 3))
    # A segment's exchange flips the lowest bit of its index.
    flipped = ptx.times(ptx.bits_of(stage, 1), 4 * SEGMENT_WORDS)
    for j in range(8):
        half, segment = j // _SEGMENTS, j % _SEGMENTS
        place = ptx.plus(ptx.flip_bits(flipped, 4 * SEGMENT_WORDS * segment), 4 * half)
        ptx.store_byte(ptx.advance(target, ptx.plus(at, place)), ptx.shift_right(words[j // 4], 8 * (j % 4)))


def by_pair(thread: Value, words: Sequence[Value]) -> list[Value]:
    """What a thread stores where positions follow floats: the words of the lanes 2 p and 2 p + 1.

    It has pair p of half h of a step, where it is 4 step + 2 h + p. Byte 2 e + p of the word of lane t is element
    8 p + 2 t + e of the half, so that the threads of both pairs exchange a word.
    """
    is_second = ptx.equal(ptx.bits_of(thread, 1), 1)
    received = ptx.exchange(ptx.choose(is_second, words[0], words[1]), 1)
    first, second = ptx.choose(is_second, received, words[0]), ptx.choose(is_second, words[1], received)
    return [ptx.pick_bytes(first, second, selector) for selector in (0x5140, 0x7362)]


def store_by_pair(target: Pointer, thread: Value, words: Sequence[Value]) -> None:
    """`store_interleaved` where positions follow floats, of the words of `by_pair`."""
    stage, step = ptx.shift_right(thread, 4), ptx.bits_of(ptx.shift_right(thread, 2), STEPS - 1)
    half, pair = ptx.bits_of(ptx.shift_right(thread, 1), 1), ptx.bits_of(thread, 1)
    at = ptx.plus(ptx.plus(ptx.times(stage, 128), ptx.times(step, 8)), ptx.times(half, 4))
    for i, word in enumerate(words):
        segment = ptx.flip_bits(ptx.plus(ptx.times(pair, 2), i), ptx.bits_of(stage, 1))
        ptx.store(ptx.advance(target, ptx.plus(at, ptx.times(segment, 4 * SEGMENT_WORDS))), [word])
