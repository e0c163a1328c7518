"""Loads and stores; a pointer is bytes, an offset for each thread, and the space it points to.

Addresses of active threads must be within bounds and aligned.
"""

from __future__ import annotations

import numpy as np

from bipolar_jax.kernels.sm90.core import ptx
from tests.support.warpgroup_simulator.control import active, check_convergence
from tests.support.warpgroup_simulator.types import THREADS

bank_conflicts = [0]  # accesses beyond the fewest possible, summed over all 16-byte loads from shared memory


def pointer(memref, space):
    assert memref.flags.c_contiguous
    return memref.reshape(-1).view(np.uint8), np.zeros(THREADS, np.int64), space


def advance(ptr, offset):
    data, offsets, space = ptr
    return data, offsets + offset, space


def advance_far(ptr, count, size):
    count = count if isinstance(count, int) else count.astype(np.int64)
    return advance(ptr, count * size)


def load(ptr, words):
    data, offsets, space = ptr
    _check_addresses(ptr, words)
    if space == ptx.SHARED and words == 4:
        _count_conflicts(offsets)
    offsets = np.where(active(), offsets, 0)
    return [data[offsets[:, None] + 4 * i + np.arange(4)].view(np.int32)[:, 0] for i in range(words)]


def store(ptr, words):
    data, offsets, _ = ptr
    _check_addresses(ptr, len(words))
    for i, word in enumerate(words):
        at = offsets[active()]
        data[at[:, None] + 4 * i + np.arange(4)] = word[active(), None].view(np.uint8)


def load_matrices(ptr):
    """By the figures of the PTX ISA: every lane points to a row, and gets a word of a row of each matrix."""
    check_convergence()
    data, offsets, _ = ptr
    _check_addresses(ptr, 4)
    if active().all():
        _count_conflicts(offsets)
    # [warp, matrix, lane]
    offsets = np.where(active(), offsets, 0)
    words = data[offsets[:, None] + np.arange(16)].view(np.int32).reshape(-1, 4, 32)
    return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(4)]


def load_transposed(ptr):
    """By the figures of the PTX ISA: every lane points to a row, and gets two numbers of a column of each matrix."""
    check_convergence()
    data, offsets, _ = ptr
    _check_addresses(ptr, 4)
    # [warp, matrix, row, column]
    matrices = data[offsets[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 4, 8, 8)
    return [np.ascontiguousarray(matrices[:, i].transpose(0, 2, 1)).view(np.int32).reshape(-1) for i in range(4)]


def prefetch(ptr):
    _check_addresses(ptr, 1)


def load_half(ptr):
    data, offsets, _ = ptr
    offsets = np.where(active(), offsets, 0)
    assert (offsets % 2 == 0).all()
    return data[offsets].astype(np.int32) | (data[offsets + 1].astype(np.int32) << 8)


def store_half(ptr, word):
    data, offsets, _ = ptr
    at = offsets[active()]
    assert (at % 2 == 0).all()
    data[at[:, None] + np.arange(2)] = word[active(), None].view(np.uint8)[:, :2]


def add_shared(ptr, word):
    data, offsets, _ = ptr
    _check_addresses(ptr, 1)
    np.add.at(data.view(np.int32), offsets[active()] // 4, word[active()])


add_global = add_shared


def take_shared(ptr):
    words = load(ptr, 1)[0]
    store(ptr, [np.zeros_like(words)])
    return words


def store_byte(ptr, word):
    data, offsets, _ = ptr
    data[offsets[active()]] = (word & 255).astype(np.uint8)[active()]


def order_before_copies():
    pass  # nothing is copied while threads run


def fence_gpu():
    pass  # one block runs at a time


def _check_addresses(ptr, words):
    data, offsets, _ = ptr
    used = offsets[active()]
    assert (used % (4 * words) == 0).all()
    assert ((used >= 0) & (used + 4 * words <= data.size)).all()


def _count_conflicts(offsets):
    """Eight lanes are served at a time; two that want different words of the same banks wait for each other."""
    for lanes in np.flatnonzero(active()).reshape(-1, 8) if active().all() else ():
        quads = np.unique(offsets[lanes] // 16)
        bank_conflicts[0] += np.bincount(quads % 8).max() - 1
