"""A token's codes as the bit planes that `mma` of bits reads beside prepared weights of 1 and 2 bits.

A stage of the token is 32 words, one for each lane of a warp: that of lane 4 n + t holds bits n of the codes whose
weights are in words of lanes 4 r + t (`packing.fields`): bit 8 i + 4 (s mod 2) + 2 h + s // 2 is that of position
32 s + 16 h + 4 t + i. Planes that the codes have not are 0. Of stages with an odd index the words of planes n and
n ^ 1 are exchanged: threads of a warp store bytes of two neighbouring stages at once, and would meet in the same banks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import STAGES_PER_SLICE
from bipolar_jax.packing.fields import STAGE

PLANES = 8
_BYTES = 16  # of a plane of a stage
# Bytes 0 and 2 of either operand, or 1 and 3 if each nibble is one more.
_EVEN_BYTES, _NEXT_BYTES = 0x6420, 0x1111
# An exchange of bits in every byte: mask of the bits that stay, distance of the others.
_EXCHANGES = ((0x33333333, 2), (0x0F0F0F0F, 4), (0x55555555, 1))


def codes_of_planes(words: UInt32[Array, "256"]) -> Int[Array, "stages positions"]:
    """The codes of a slice by stage and position, in jnp."""
    planes = _exchanged(words.reshape(STAGES_PER_SLICE, PLANES, 4, 1))
    bits = (planes >> _bit_index()) & 1
    codes = jnp.sum(bits << _plane_index(), axis=1)
    codes = codes.reshape(STAGES_PER_SLICE, 4, 4, 2, 2, 2)  # t, byte, s mod 2, h, s // 2
    return codes.transpose(0, 5, 3, 4, 1, 2).reshape(STAGES_PER_SLICE, STAGE).astype(jnp.int32)


def _plane_index() -> UInt32[Array, "1 planes 1 1"]:
    return jnp.arange(PLANES, dtype=jnp.uint32).reshape(1, -1, 1, 1)


def _bit_index() -> UInt32[Array, "1 1 1 32"]:
    return jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 1, -1)


def _exchanged(planes: UInt32[Array, "stages planes 4 1"]) -> UInt32[Array, "stages planes 4 1"]:
    pairs = planes.reshape(STAGES_PER_SLICE // 2, 2, PLANES // 2, 2, 4)
    return jnp.stack([pairs[:, 0], pairs[:, 1, :, ::-1]], axis=1).reshape(planes.shape)


@dataclasses.dataclass(frozen=True)
class PlaneLayout:
    """`token_bytes.TokenLayout` of bit planes; elements are interleaved, not in their natural order."""

    def words_of(self, codes, inside, a_format):
        # s // 2, s mod 2, byte, h, t
        codes = codes.reshape(STAGES_PER_SLICE, 2, 2, 4, 2, 4).transpose(0, 5, 3, 2, 4, 1)
        codes = codes.reshape(STAGES_PER_SLICE, 1, 4, 32).astype(jnp.uint32)
        bits = (codes >> _plane_index()) & 1
        planes = jnp.sum(bits << _bit_index(), axis=-1, keepdims=True, dtype=jnp.uint32)
        return _exchanged(planes).reshape(-1)

    def arrange(self, thread, words, inside, a_format):
        if inside is not None:
            words = [ptx.choose(inside, word, ptx.int32(0)) for word in words]
        return transposed_codes(thread, words)

    def store(self, target, thread, words):
        store_planes(target, thread, words)


# Below: for use within `plgpu.inline_mgpu`.


def transposed_codes(thread: Value, words: Sequence[Value]) -> list[Value]:
    """Bits of eight elements of one plane after the other, from the codes of eight elements.

    Threads of a stage are 4 s + i; each has elements t + 4 h of their own 8, byte t of word h. Afterwards thread
    4 t + i has bit 4 (s mod 2) + 2 h + s // 2 of byte j of word e: that of plane 2 j + e. Bits of h, s mod 2 and s // 2
    change places with those of the plane, in turn; between threads t changes places with s.
    """
    (stays, distance), *between_threads = _EXCHANGES
    words = _exchanged_bits(words, stays, distance)
    for lanes, (stays, distance) in zip((4, 8), between_threads, strict=True):
        is_second = ptx.equal(ptx.bits_of(thread, lanes), lanes)
        kept = ptx.choose(is_second, ptx.int32(_EVEN_BYTES + _NEXT_BYTES), ptx.int32(_EVEN_BYTES))
        own = ptx.pick_bytes(*words, kept)
        other = ptx.exchange(ptx.pick_bytes(*words, ptx.flip_bits(kept, _NEXT_BYTES)), lanes)
        words = [ptx.choose(is_second, a, b) for a, b in ((other, own), (own, other))]
        words = _exchanged_bits(words, stays, distance)
    return words


def _exchanged_bits(words: Sequence[Value], stays: int, distance: int) -> list[Value]:
    """Two words whose bits outside of the mask in one, and in it in the other, changed places."""
    low, high = words
    return [
        ptx.choose_bits(stays, low, ptx.shift_left(high, distance)),
        ptx.choose_bits(stays, ptx.shift_right(low, distance), high),
    ]


def store_planes(target: Pointer, thread: Value, words: Sequence[Value]) -> None:
    """Stores what `transposed_codes` returns: byte i of the words of lanes 4 n + t."""
    stage = ptx.shift_right(thread, 4)
    is_odd = ptx.equal(ptx.bits_of(stage, 1), 1)
    even, odd = (ptx.choose(is_odd, *pair) for pair in (words[::-1], words))
    first = ptx.advance(target, ptx.plus(ptx.times(stage, STAGE), ptx.bits_of(thread, _BYTES - 1)))
    for plane in range(PLANES):
        byte, word = plane // 2, odd if plane % 2 else even
        ptx.store_byte(ptx.advance(first, _BYTES * plane), ptx.shift_right(word, 8 * byte))


def plane_word(token: Pointer, stage: Value, lane: Value) -> Pointer:
    """Where a lane's word of a stage is in the token's slice."""
    word = ptx.flip_bits(lane, ptx.times(ptx.bits_of(stage, 1), 4))
    return ptx.advance(token, ptx.plus(ptx.times(stage, STAGE), ptx.times(word, 4)))
