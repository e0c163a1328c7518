"""Branches, loops, barriers, and exchanges between the lanes of a warp."""

from __future__ import annotations

import contextlib

import numpy as np

from tests.support.warpgroup_simulator.types import THREADS, WARP, int32

_active = [np.ones(THREADS, bool)]  # the masks of nested conditions, the innermost last


def active():
    """Which threads execute."""
    return _active[-1]


def thread_in_warpgroup():
    return np.arange(THREADS, dtype=np.int32)


def opaque(word):
    return word


def clock():
    return np.zeros(THREADS, np.int32)


nanoseconds = clock


def synchronize(lanes_apart=False):
    assert _active[-1].all()


def synchronize_warp():
    check_convergence()


def meet_cluster():
    assert _active[-1].all()


meet_block = meet_cluster


@contextlib.contextmanager
def when(condition):
    _active.append(_active[-1] & condition)
    yield
    _active.pop()


def repeat(count, values, body):
    for i in range(count):
        values = body(int32(i), values)
    return values


def update_if(condition, values, body):
    with when(condition):
        new = body()
    return [np.where(condition, a, b) for a, b in zip(new, values, strict=True)]


def exchange(word, distance):
    check_convergence()
    return word[np.arange(THREADS) ^ distance]


def from_lane(word, lane):
    check_convergence()
    return word[np.arange(THREADS) // WARP * WARP + lane]


def over_warp(kind, word):
    check_convergence()
    reduce = {"add": np.sum, "max": np.max, "min": np.min}[kind]
    return np.repeat(reduce(word.reshape(-1, WARP), axis=1).astype(np.int32), WARP)


def check_convergence():
    """Lanes exchange values only where their whole warp executes."""
    by_warp = _active[-1].reshape(-1, WARP)
    assert (by_warp.all(1) | ~by_warp.any(1)).all()
