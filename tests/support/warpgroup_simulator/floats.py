"""Arithmetic of floats, rounded as the instructions round."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.support.warpgroup_simulator.control import active, check_convergence
from tests.support.warpgroup_simulator.types import THREADS, WARP

_TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def as_float(word):
    return word.view(np.float32)


def as_word(number):
    return number.view(np.int32)


def expand(number, word):
    if number == "f32":
        return [as_float(word)]
    halves = word[:, None].view(_TYPES[number])
    return [halves[:, i].astype(np.float32) for i in range(2)]


def extreme(kind, number, a, b):
    choose_one = np.maximum if kind == "max" else np.minimum  # NaN if either is
    if number == "f32":
        return as_word(choose_one(as_float(a), as_float(b)))
    halves = [choose_one(x, y) for x, y in zip(expand(number, a), expand(number, b), strict=True)]
    return np.ascontiguousarray(np.stack(halves, 1).astype(_TYPES[number])).view(np.int32)[:, 0]


def _sum_to_odd(a, b):
    """a + b in float64, the last bit set if inexact: rounding this to float32 is rounding the sum."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = a + b
        part = total - a
        error = (a - (total - part)) + (b - part)
        even = (total.view(np.int64) & 1) == 0
        return np.where((error != 0) & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def _to_float32(a):
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return a.astype(np.float32)


def fma(a, b, c):
    with np.errstate(invalid="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)  # exact
    return _to_float32(_sum_to_odd(product, c.astype(np.float64)))


def fma_pairs(number, a, b, c):
    exact = [_sum_to_odd(*_halves(number, a, b, c, half)) for half in range(2)]
    with np.errstate(over="ignore"):
        return _joined([half.astype(_TYPES[number]) for half in exact])


def _halves(number, a, b, c, half):
    a, b, c = (word[:, None].view(_TYPES[number])[:, half].astype(np.float64) for word in (a, b, c))
    return a * b, c


def _joined(halves):
    return np.ascontiguousarray(np.stack(halves, 1)).view(np.int32)[:, 0]


def rounded(number, a):
    return _joined([a.astype(_TYPES[number])] * 2)


def rounded_pair(number, low, high):
    with np.errstate(over="ignore"):
        return _joined([half.astype(_TYPES[number]) for half in (low, high)])


def multiply_add_tiles(number, a, b, c):
    """By the figures of the PTX ISA: a lane has row or column lane // 4, and two k or columns from 2 (lane % 4)."""
    check_convergence()
    lane = np.arange(WARP)
    r, q = lane // 4, 2 * (lane % 4)
    out = [np.zeros(THREADS, np.float32) for _ in c]
    for first in range(0, THREADS, WARP):
        if not active()[first]:
            continue
        mine = slice(first, first + WARP)
        left, right = np.zeros((16, 16)), np.zeros((16, 8))
        for i in range(2):
            for register, (row, k) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
                left[r + row, q + k + i] = expand(number, a[register][mine])[i]
            for register, k in enumerate([0, 8]):
                right[q + k + i, r] = expand(number, b[register][mine])[i]
        product = left @ right
        for register, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
            out[register][mine] = c[register][mine] + product[r + row, q + column]
    return out


def multiply(a, b):
    with np.errstate(invalid="ignore"):
        return _to_float32(a.astype(np.float64) * b.astype(np.float64))


def add(a, b):
    return _to_float32(_sum_to_odd(a.astype(np.float64), b.astype(np.float64)))


def add_down(a, b):
    exact = _sum_to_odd(a.astype(np.float64), b.astype(np.float64))
    nearest = _to_float32(exact)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def subtract(a, b):
    return add(a, -b)


def divide(a, b):
    with np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore"):
        return a / b


def rsqrt(a):
    with np.errstate(invalid="ignore", divide="ignore"):
        return _to_float32(1 / np.sqrt(a.astype(np.float64)))


def reciprocal(a):
    with np.errstate(divide="ignore"):
        return np.float32(1) / a


def exp2(a):
    with np.errstate(over="ignore", under="ignore"):
        return np.exp2(a)


def at_most(a, limit):
    return np.fmin(a, np.float32(limit))


def at_least(a, limit):
    return np.fmax(a, np.float32(limit))


def is_less(a, b):
    return a < np.float32(b)


def is_greater(a, b):
    return a > np.float32(b)


def floor(a):
    return np.floor(a)


def from_int(word):
    return word.astype(np.float32)


def to_int(a):
    return a.astype(np.int32)
