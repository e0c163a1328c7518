"""A token's numbers to codes, and codes to the bit planes that the tensor cores read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import (
    K_SLICE_LAYOUT,
    SPLAT,
    WARPS,
    lane_and_warp,
    numbers_of,
    thread_index,
)
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE, TILE_TRANSFORMS


def pack(
    tiles: Sequence[Any],
    sums,
    warpgroup: Int[Array, ""],
    parts: Sequence[Float[Array, "1024"]],
    starts: Sequence[Int[Array, ""]],
    k: int,
    half_steps: Float[Array, ""],
    middle: Float[Array, ""],
    a_format: BipolarFormat,
    *,
    emulate: bool,
) -> None:
    """Encodes numbers, writes their bit planes as rows of tiles, and leaves every warp's sum of codes.

    The code of x is floor(x * half_steps + 1/2) + middle, without the half for one bit, clipped; none from k on.

    Args:
      tiles: for each part, shared memory, uint32 [8, 32] with TILE_TRANSFORMS; plane i is row i.
      sums: int32 [warps of the block].
      warpgroup: which this is.
      parts: numbers.
      starts: where in K the parts begin.
      k: the contracted size, a multiple of 8.
      half_steps: 1 / (2 scale).
      middle: the code of zero; 1 of one bit.
      a_format: 1 to 8 bits.
    """
    half, bits, top = 0.0 if a_format.bits == 1 else 0.5, a_format.bits, float(a_format.max_value)
    if emulate:
        total = jnp.int32(0)
        for tile, part, start in zip(tiles, parts, starts, strict=True):
            codes = jnp.clip(jnp.floor(part * half_steps + half) + middle, 0.0, top).astype(jnp.int32)
            codes = jnp.where(start + lax.iota(jnp.int32, K_SLICE) < k, codes, 0)
            for plane in range(bits):
                by_word = ((codes >> plane) & 1).astype(jnp.uint32).reshape(-1, 32)
                tile[plane] = jnp.sum(by_word << lax.iota(jnp.uint32, 32), axis=1, dtype=jnp.uint32)
            total += jnp.sum(codes)
        for warp in range(WARPS):
            sums[warpgroup * WARPS + warp] = total if warp == 0 else jnp.int32(0)
        return
    count = len(parts)
    types = [plgpu.RefType(), SPLAT, SPLAT, SPLAT]
    types += [plgpu.RefType(TILE_TRANSFORMS)] * count + [K_SLICE_LAYOUT] * count + [SPLAT] * count

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def inline(_, sums, warpgroup, half_steps, middle, *arrays):
        thread, total = thread_index(), ptx.int32(0)
        # Added to 2^23 a number's fraction falls off, and what is left is in the low bits.
        magic = float(1 << 23)
        base = ptx.add(middle.registers.item(), ptx.float32(magic))
        factor = half_steps.registers.item()

        def encode(number):
            steps = ptx.fma(number, factor, ptx.float32(half))
            return ptx.as_word(ptx.at_least(ptx.at_most(ptx.add_down(steps, base), magic + top), magic))

        for tile, part, start in zip(arrays[:count], arrays[count : 2 * count], arrays[2 * count :], strict=True):
            codes = [encode(number) for number in numbers_of(part)]
            inside = ptx.less(ptx.plus(start.registers.item(), ptx.times(thread, 8)), k)
            words = [ptx.choose(inside, low_bytes(codes[i : i + 4]), ptx.int32(0)) for i in (0, 4)]
            for word in words:
                total = ptx.add_bytes(word, total, signed=False)
            where = ptx.pointer(tile, ptx.SHARED)
            planes = transposed_bytes(*words)
            for plane in range(bits):
                # Byte `thread` of the row; the swizzle exchanges a row's pieces of 16 bytes.
                byte = ptx.plus(ptx.flip_bits(thread, plane << 4), 128 * plane)
                word = ptx.shift_right(planes[plane // 4], 8 * (plane % 4))
                ptx.store_byte(ptx.advance(where, byte), word)
        total = ptx.over_warp("add", total)
        lane, warp = lane_and_warp()
        with ptx.when(ptx.equal(lane, 0)):
            index = ptx.plus(ptx.times(warpgroup.registers.item(), WARPS), warp)
            ptx.store(ptx.advance_far(ptx.pointer(sums, ptx.SHARED), index, 4), [total])

    inline(sums, jnp.int32(warpgroup), half_steps, middle, *tiles, *parts, *map(jnp.int32, starts))


def low_bytes(words: Sequence[ir.Value]) -> ir.Value:
    """The low bytes of four words."""
    pairs = [ptx.pick_bytes(a, b, 0x0040) for a, b in (words[:2], words[2:])]
    return ptx.pick_bytes(*pairs, 0x5410)


def transposed_bytes(low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Eight bytes as a matrix of bits, transposed: bit i of byte p is bit p of byte i.

    Blocks of 1, of 2 and of 4 bits off the diagonal are exchanged; source: Hacker's Delight, section 7-3.
    """

    def exchanged(word, distance, mask):
        differ = ptx.bits_of(ptx.flip_bits(word, ptx.shift_right(word, distance)), mask)
        return ptx.flip_bits(word, ptx.flip_bits(differ, ptx.shift_left(differ, distance)))

    low, high = (exchanged(exchanged(word, 7, 0x00AA00AA), 14, 0x0000CCCC) for word in (low, high))
    differ = ptx.bits_of(ptx.flip_bits(low, ptx.shift_left(high, 4)), 0xF0F0F0F0)
    return ptx.flip_bits(low, differ), ptx.flip_bits(high, ptx.shift_right(differ, 4))
