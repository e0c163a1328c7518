"""Encodes a token's numbers, and stores the codes as the bit planes that the tensor cores read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    K_SLICE_LAYOUT,
    SPLAT,
    WARPS,
    lane_and_warp,
    numbers_of,
    scalar_of,
    thread_index,
)
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE, TILE_TRANSFORMS


def codes_of(numbers, start, k, half_steps, middle, a_format: BipolarFormat) -> Int[Array, "1024"]:
    """The codes of a slice, in jnp; see `store_bit_planes`."""
    codes = jnp.floor(numbers * half_steps + _rounding_half(a_format)) + middle
    codes = jnp.clip(codes, 0.0, float(a_format.max_value)).astype(jnp.int32)
    return jnp.where(start + lax.iota(jnp.int32, K_SLICE) < k, codes, 0)


def _store_code_sums_twin(code_sums, warpgroup, total):
    for warp in range(WARPS):
        code_sums[warpgroup * WARPS + warp] = total if warp == 0 else jnp.int32(0)


def _store_bit_planes_twin(tiles, code_sums, warpgroup, k_slices, starts, k, half_steps, middle, a_format):
    total = jnp.int32(0)
    for tile, numbers, start in zip(tiles, k_slices, starts, strict=True):
        codes = codes_of(numbers, start, k, half_steps, middle, a_format)
        for plane in range(a_format.bits):
            by_word = ((codes >> plane) & 1).astype(jnp.uint32).reshape(-1, 32)
            tile[plane] = jnp.sum(by_word << lax.iota(jnp.uint32, 32)[None], axis=1, dtype=jnp.uint32)
        total += jnp.sum(codes)
    store_code_sums(code_sums, warpgroup, total)


@with_twin(_store_bit_planes_twin)
def store_bit_planes(
    tiles: Sequence[Any],
    code_sums,
    warpgroup: Int[Array, ""],
    k_slices: Sequence[Float[Array, "1024"]],
    starts: Sequence[Int[Array, ""]],
    k: int,
    half_steps: Float[Array, ""],
    middle: Float[Array, ""],
    a_format: BipolarFormat,
) -> None:
    """Encodes K slices, stores their bit planes as rows of tiles, and every warp's sum of codes.

    The code of x is clip(floor(x * half_steps + 1/2) + middle); with one bit there is no 1/2. It is 0 from k on.

    Args:
      tiles: one for each slice: shared memory, uint32 [8, 32] with TILE_TRANSFORMS; plane i is row i.
      code_sums: shared memory, int32 [warps of the block].
      warpgroup: of the calling threads.
      k_slices: the numbers, in K_SLICE_LAYOUT.
      starts: index in K of each slice's first element.
      k: the contracted size, a multiple of 8.
      half_steps: 1 / (2 scale).
      middle: the code of zero; 1 for one bit.
      a_format: 1 to 8 bits.
    """
    bits, count = a_format.bits, len(k_slices)
    types = [plgpu.RefType(), SPLAT, SPLAT, SPLAT]
    types += [plgpu.RefType(TILE_TRANSFORMS)] * count + [K_SLICE_LAYOUT] * count + [SPLAT] * count

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def inline(_, code_sums, warpgroup, half_steps, middle, *arrays):
        thread, total = thread_index(), ptx.int32(0)
        encode = code_encoder(scalar_of(half_steps), scalar_of(middle), a_format)
        for tile, numbers, start in zip(arrays[:count], arrays[count : 2 * count], arrays[2 * count :], strict=True):
            codes = [encode(number) for number in numbers_of(numbers)]
            inside = ptx.less(ptx.plus(scalar_of(start), ptx.times(thread, 8)), k)
            packed_codes = [ptx.choose(inside, low_bytes(codes[i : i + 4]), ptx.int32(0)) for i in (0, 4)]
            for word in packed_codes:
                total = ptx.add_bytes(word, total, signed=False)
            first_row = ptx.pointer(tile, ptx.SHARED)
            planes = transpose_bits(*packed_codes)
            for plane in range(bits):
                # Byte `thread` of row `plane`; the swizzle XORs the index of a row's 16-byte segment with the row.
                byte = ptx.plus(ptx.flip_bits(thread, plane << 4), 128 * plane)
                word = ptx.shift_right(planes[plane // 4], 8 * (plane % 4))
                ptx.store_byte(ptx.advance(first_row, byte), word)
        store_code_sums(code_sums, scalar_of(warpgroup), total)

    inline(code_sums, jnp.int32(warpgroup), half_steps, middle, *tiles, *k_slices, *map(jnp.int32, starts))


def _rounding_half(a_format: BipolarFormat) -> float:
    return 0.0 if a_format.bits == 1 else 0.5


# Below: for use within `plgpu.inline_mgpu`.


def code_encoder(half_steps: Value, middle: Value, a_format: BipolarFormat) -> Callable[[Value], Value]:
    """The function of a number to its code, in the low byte of a word; see `store_bit_planes`."""
    half, top = _rounding_half(a_format), float(a_format.max_value)
    # Rounded down to a multiple of 1 by adding 2^23: the integer is then in the low bits of the mantissa.
    magic = float(1 << 23)
    base = ptx.add(middle, ptx.float32(magic))

    def encode(number: Value) -> Value:
        steps = ptx.fma(number, half_steps, ptx.float32(half))
        return ptx.as_word(ptx.at_least(ptx.at_most(ptx.add_down(steps, base), magic + top), magic))

    return encode


@with_twin(_store_code_sums_twin)
def store_code_sums(code_sums: Value, warpgroup: Value, total: Value) -> None:
    """Stores every warp's sum of its threads' totals, at its index in the block."""
    total = ptx.over_warp("add", total)
    lane, warp = lane_and_warp()
    with ptx.when(ptx.equal(lane, 0)):
        index = ptx.plus(ptx.times(warpgroup, WARPS), warp)
        ptx.store(ptx.advance_far(ptx.pointer(code_sums, ptx.SHARED), index, 4), [total])


def low_bytes(words: Sequence[Value]) -> Value:
    """The low bytes of four words, as one word."""
    pairs = [ptx.pick_bytes(a, b, 0x0040) for a, b in (words[:2], words[2:])]
    return ptx.pick_bytes(*pairs, 0x5410)


def transpose_bits(low: Value, high: Value) -> tuple[Value, Value]:
    """Eight bytes as an 8 x 8 bit matrix, transposed: bit i of byte p is bit p of byte i.

    Swaps off-diagonal blocks of 1, of 2 and of 4 bits; source: Hacker's Delight, section 7-3.
    """

    def swapped(word, distance, mask):
        differ = ptx.bits_of(ptx.flip_bits(word, ptx.shift_right(word, distance)), mask)
        return ptx.flip_bits(word, ptx.flip_bits(differ, ptx.shift_left(differ, distance)))

    low, high = (swapped(swapped(word, 7, 0x00AA00AA), 14, 0x0000CCCC) for word in (low, high))
    differ = ptx.bits_of(ptx.flip_bits(low, ptx.shift_left(high, 4)), 0xF0F0F0F0)
    return ptx.flip_bits(low, differ), ptx.flip_bits(high, ptx.shift_right(differ, 4))
