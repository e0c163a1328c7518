"""Arithmetic and bits of 32-bit integers."""

from __future__ import annotations

import numpy as np

from tests.support.warpgroup_simulator.control import active, check_convergence
from tests.support.warpgroup_simulator.types import THREADS, WARP, int32


def less(a, b):
    return a < b


def equal(a, b):
    return a == b


def choose(condition, a, b):
    return np.where(condition, a, b)


def smaller(a, b):
    return np.minimum(a, np.int32(b))


def plus(a, b):
    return a + (int32(b) if isinstance(b, int) else b)


def times(a, b):
    return a * (int32(b) if isinstance(b, int) else b)


def divided(a, b):
    assert (a >= 0).all()
    return a // np.int32(b)


def either_bits(a, b):
    return a | b


def shift_right_signed(word, count):
    return word >> np.int32(count)


def bits_of(word, mask):
    return word & (int32(mask) if isinstance(mask, int) else mask)


def flip_bits(word, mask):
    return word ^ (int32(mask) if isinstance(mask, int) else mask)


def shift_left(word, count):
    return word << (np.int32(count) if isinstance(count, int) else count)


def shift_right(word, count):
    count = np.uint32(count) if isinstance(count, int) else count.view(np.uint32)
    return (word.view(np.uint32) >> count).view(np.int32)


def choose_bits(mask, ones, zeros):
    return (ones & int32(mask)) | (zeros & ~int32(mask))


def masked_or(word, mask, ones):
    return (word & int32(mask)) | int32(ones)


def pick_bytes(a, b, selector):
    selector = int32(selector) if isinstance(selector, int) else selector
    both = np.stack([a, b], 1).view(np.uint8)
    picked = [both[np.arange(THREADS), (selector >> (4 * t)) & 7] for t in range(4)]
    return np.ascontiguousarray(np.stack(picked, 1)).view(np.int32)[:, 0]


def count_ones(word):
    return np.bitwise_count(word.view(np.uint32)).astype(np.int32)


def add_bytes(word, total, *, signed):
    return total + word[:, None].view(np.int8 if signed else np.uint8).sum(1, dtype=np.int32)


def add_pair_products(pair, byte_pairs, total, *, high):
    numbers = pair[:, None].view(np.uint16).astype(np.uint32)
    factors = byte_pairs[:, None].view(np.uint8)[:, 2 * high : 2 * high + 2].astype(np.uint32)
    return (total.view(np.uint32) + (numbers * factors).sum(1, dtype=np.uint32)).view(np.int32)


def multiply_add_bit_tiles(a, b, c):
    """By the figures of the PTX ISA: a lane has row or column lane // 4, and 32 k from 32 (lane % 4)."""
    check_convergence()

    def bits(word):  # [warps, lane // 4, k of 128]
        by_byte = np.ascontiguousarray(word).view(np.uint8).reshape(-1, WARP // 4, 16)
        return np.unpackbits(by_byte, axis=-1, bitorder="little").astype(np.int32)

    sums = np.zeros((THREADS // WARP, 16, 8), np.int32)
    for i, word in enumerate(b):
        rows = np.concatenate([bits(word_of_row) for word_of_row in a[2 * i : 2 * i + 2]], axis=1)
        sums += rows @ bits(word).transpose(0, 2, 1)
    by_lane = sums.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(THREADS, 4)
    return [np.where(active(), number + of_lane, 0) for number, of_lane in zip(c, by_lane.T, strict=True)]


def multiply_add_byte_tiles(a, b, c):
    """By the figures of the PTX ISA: a lane has row or column lane // 4, and four k from 4 (lane % 4)."""
    check_convergence()
    lane = np.arange(WARP)
    r, q = lane // 4, lane % 4
    out = [np.zeros(THREADS, np.int32) for _ in c]
    for first in range(0, THREADS, WARP):
        if not active()[first]:
            continue
        mine = slice(first, first + WARP)
        left, right = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
        for register, (row, k) in enumerate([(0, 0), (8, 0), (0, 16), (8, 16)][: len(a)]):
            for i, byte in enumerate(a[register][mine, None].view(np.uint8).T):
                left[r + row, 4 * q + k + i] = byte
        for register, k in enumerate([0, 16][: len(b)]):
            for i, byte in enumerate(b[register][mine, None].view(np.int8).T):
                right[4 * q + k + i, r] = byte
        product = left @ right
        for register, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
            out[register][mine] = c[register][mine] + product[r + row, 2 * q + column].astype(np.int32)
    return out
