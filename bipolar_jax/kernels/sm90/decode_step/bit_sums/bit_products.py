"""What the warps of a warpgroup do with parts of weights of 1 and 2 bits: `mma` of bits, and sums of planes.

The columns of an instruction are the planes of the one token's codes u_a, its rows those of the weights' codes u; so a
lane 4 r + t has counts c_n of the planes n = 2 t and 2 t + 1, of rows r and r + 8. Each count is of one chunk of terms,
(s, o + 128). What a lane adds up for a row is

    sum over chunks of  s (c_2t + 2 c_2t+1) + (o + 128) (x_2t + 2 x_2t+1),

where x_n counts the ones of plane n: the product of a row of ones. The sum of (s u + o + 128) u_a is the sum over t of
4^t times that. Everything is modulo 2^32. The weights' words are fragments as they are stored; of 2 bits, whose codes
have even and odd bits, the token's bits are put beside either.

A warpgroup's numbers lie over its threads by fours: number 2 b + p of lane 4 r + t belongs to row 16 b + 8 p + r.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import WARPS, lane_and_warp
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_step.bit_sums.token_planes import codes_of_planes, plane_word
from bipolar_jax.kernels.sm90.decode_step.part_sums import (
    BLOCK_ROWS,
    add_own_stages,
    inline_stages,
    inline_sums,
    own_positions,
    sums_by_warp,
)
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALVES, Expansion
from bipolar_jax.packing.fields import STEPS, VECTOR, WORDS_PER_VECTOR, expand_part, fields_of, step_words

_EVERY_BYTE = 0x01010101
_ALL_BITS = 0xFFFFFFFF
_LOW_HALVES = 0x5410  # of two words, as one
_ROWS_OF_LANE = 4
_SIZE = WARPGROUP * _ROWS_OF_LANE
SUMS = plgpu.Layout.WG_STRIDED((_SIZE,), vec_size=_ROWS_OF_LANE)
_QUADS = 4  # lanes that share rows


def zeros() -> Int[Array, "512"]:
    """Sums to begin a part with."""
    return plgpu.layout_cast(jnp.zeros(_SIZE, jnp.int32), SUMS)


def _add_stages_twin(total, words, terms, token, part_of_slice, valid, expansion):
    weights = expand_part(words[...], None if terms is None else terms[...])
    own, active = own_positions(token, part_of_slice, valid, words.shape[0], codes_of_planes)
    plgpu.commit_smem()  # for the race detector, see `part_sums`
    by_pair = (own[:, None] >> 2 * jnp.arange(_QUADS).reshape(1, -1, 1)) & 3  # stages, pairs of planes, positions
    sums = jnp.einsum("srk,stk->srt", weights, by_pair)
    by_lane = sums_by_warp(sums, active).reshape(WARPS, 2, 2, 8, _QUADS)  # warps, b, p, r, t
    return total + by_lane.transpose(0, 3, 4, 1, 2).reshape(-1)


@with_twin(_add_stages_twin)
def add_stages(
    total: Int[Array, "512"],
    words: Any,
    terms: Any,
    token: Any,
    part_of_slice: Int[Array, ""],
    valid: Any,
    expansion: Expansion,
) -> Int[Array, "512"]:
    """Adds a load's products to the sums of a warpgroup's warps.

    Args:
      token: shared memory, uint32 [SLICE_WORDS]: planes of the K slice that the stages are out of.
      total, words, terms, part_of_slice, valid, expansion: as of `part_sums.add_stages`.
    """
    stages = words.shape[0]

    def of_warp(total, pointers, part_of_slice, valid):
        return add_stages_of_warp(total, pointers, part_of_slice, valid, stages, expansion)

    return inline_stages(of_warp, total, words, terms, token, part_of_slice, valid, SUMS)


def _add_sums_twin(sums, total, start, block_stride):
    weighted = total.reshape(WARPS, 8, _QUADS, 2, 2) << 2 * jnp.arange(_QUADS).reshape(1, 1, -1, 1, 1)
    by_row = jnp.sum(weighted, axis=(0, 2)).transpose(1, 2, 0)  # b, p, r
    for block in range(2):
        sums[pl.ds(start + block * block_stride, BLOCK_ROWS)] = by_row[block].reshape(-1)


@with_twin(_add_sums_twin)
def add_sums(sums: Any, total: Int[Array, "512"], start: Int[Array, ""], block_stride: int) -> None:
    """sums[start + block_stride b + i] += the warpgroup's sum for row 16 b + i of the part, i below 16.

    Args:
      sums: shared memory, int32 [rows], cleared.
      total: as `add_stages` returns it.
    """
    of_warp = functools.partial(add_sums_of_warp, block_stride=block_stride)
    inline_sums(of_warp, sums, total, start, SUMS)


# Below: for use within `plgpu.inline_mgpu`.


def add_stages_of_warp(
    total: list[Value],
    pointers: Sequence[Pointer],
    part_of_slice: Value,
    valid: Sequence[Value],
    stages: int,
    expansion: Expansion,
) -> list[Value]:
    """The thread's numbers of `add_stages`; `valid` is empty or one word."""

    def multiply(sums: list[Value], words: Pointer, terms: list[Pointer], token: Pointer, lane: Value) -> list[Value]:
        return _multiply_stage(sums, words, terms, token, lane, expansion)

    return add_own_stages(total, pointers, part_of_slice, valid, stages, expansion, multiply, plane_word)


def _multiply_stage(
    total: Sequence[Value], words: Pointer, terms: list[Pointer], token: Pointer, lane: Value, expansion: Expansion
) -> list[Value]:
    """Adds a warp's products of one stage."""
    bits, chunks = expansion.bits, max(1, expansion.chunks)
    mine = ptx.advance(words, ptx.times(lane, 4 * VECTOR))
    vectors = [ptx.load(ptx.advance(mine, 4 * WORDS_PER_VECTOR * i), VECTOR) for i in range(bits)]
    halves = range(min(HALVES, expansion.chunks))
    pairs = [pair for half in halves for pair in expansion.load_term_words(terms[0], lane, half)]
    (token_word,) = ptx.load(token, 1)
    total, zero = list(total), ptx.int32(0)
    for chunk in range(chunks):
        used, by_plane = _token_bits(token_word, bits, chunk, chunks)
        if terms:
            ones = [ptx.int32(_ALL_BITS)] * (2 * len(used))
            token_sum = _of_planes([ptx.multiply_add_bit_tiles(ones, by_plane[0], [zero] * 4)], 0)
        for block in range(2):
            weights = [vectors[i][2 * block + row] for i in used for row in range(2)]
            own = total[2 * block : 2 * block + 2]
            begins = [[zero] * 4] * bits if terms else [[own[0], zero, own[1], zero], *[[zero] * 4] * (bits - 1)]
            counts = [ptx.multiply_add_bit_tiles(weights, *operands) for operands in zip(by_plane, begins, strict=True)]
            for row in range(2):
                number, at = _of_planes(counts, row), 2 * block + row
                if terms:
                    both = ptx.pick_bytes(number, token_sum, _LOW_HALVES)  # of at most 3 * 3 * 128 each
                    number = ptx.add_pair_products(both, pairs[chunk][block], total[at], high=row == 1)
                total[at] = number
    return total


def _token_bits(token: Value, bits: int, chunk: int, chunks: int) -> tuple[list[int], list[list[Value]]]:
    """Which of the weights' vectors a chunk is in, and for each plane of the weights the token's bits beside these.

    The token's bits lie as those of weights of 1 bit do.
    """
    masks: dict[int, int] = {}
    for step in range(chunk * STEPS // chunks, (chunk + 1) * STEPS // chunks):
        vector = step_words(bits, step).start // VECTOR
        for (field,) in fields_of(1, step):
            masks[vector] = masks.get(vector, 0) | _EVERY_BYTE << field.position
    by_plane = []
    for plane in range(bits):
        moved = []
        for vector, mask in masks.items():
            word = token if mask == _ALL_BITS else ptx.bits_of(token, mask)
            distance = plane - vector if bits > 1 else 0
            moved.append(ptx.shift_left(word, distance) if distance >= 0 else ptx.shift_right(word, -distance))
        by_plane.append(moved)
    return list(masks), by_plane


def _of_planes(counts: list[list[Value]], row: int) -> Value:
    """c_2t + 2 c_2t+1 of a row, of counts of each plane of the weights with their powers of two."""
    first, *others = counts
    number, twice = first[2 * row], first[2 * row + 1]
    for other in others:
        twice = ptx.plus(twice, other[2 * row])
    number = ptx.plus(number, ptx.shift_left(twice, 1))
    for other in others:
        number = ptx.plus(number, ptx.shift_left(other[2 * row + 1], 2))
    return number


def add_sums_of_warp(sums: Pointer, total: Sequence[Value], start: Value, block_stride: int) -> None:
    """The thread's part of `add_sums`: lane 4 r + b + 2 p adds row 16 b + 8 p + r, of all t."""
    lane, _ = lane_and_warp()
    shift = ptx.times(ptx.bits_of(lane, _QUADS - 1), 2)
    block, half = ptx.bits_of(lane, 1), ptx.bits_of(ptx.shift_right(lane, 1), 1)
    numbers = [ptx.shift_left(number, shift) for number in total]
    numbers = _added_halves(numbers, ptx.equal(block, 1), 1)
    (number,) = _added_halves(numbers, ptx.equal(half, 1), 2)
    row = ptx.plus(ptx.plus(ptx.times(block, block_stride), ptx.times(half, 8)), ptx.shift_right(lane, 2))
    ptx.add_shared(ptx.advance_far(sums, ptx.plus(start, row), 4), number)


def _added_halves(numbers: list[Value], is_second: Value, lanes: int) -> list[Value]:
    """Sums of this lane's and another's first halves, or second halves: either lane takes one."""
    pairs = list(zip(numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :], strict=True))
    others = [ptx.exchange(ptx.choose(is_second, *pair), lanes) for pair in pairs]
    return [ptx.plus(ptx.choose(is_second, *pair[::-1]), other) for pair, other in zip(pairs, others, strict=True)]
