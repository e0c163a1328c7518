"""The functions of `kernels.sm90.core.ptx` for the 128 threads of a warpgroup at once, in numpy.

A value is an array of 128 numbers, one for each thread; a pointer is bytes and 128 offsets. All threads run in
lockstep: barriers do nothing, and races are not found (interpret mode finds those). Checked: addresses of active
threads are within bounds and aligned, and lanes exchange words only while their whole warp is active.
"""

from __future__ import annotations

import contextlib
import inspect

import ml_dtypes
import numpy as np

from bipolar_jax.kernels.sm90.core import ptx

THREADS, WARP = 128, 32
_TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
_active = [np.ones(THREADS, bool)]
bank_conflicts = [0]  # more than the fewest possible accesses, summed over all loads of 16 bytes


def install(monkeypatch) -> None:
    """Puts this module's functions in the place of all of the instructions'."""
    for name, function in vars(ptx).items():
        own = inspect.isfunction(function) and function.__module__.startswith(ptx.__name__)
        if own and not name.startswith("_") and not name.endswith("_type"):
            monkeypatch.setattr(ptx, name, globals()[name])


def int32(number):
    return np.full(THREADS, np.uint32(number & 0xFFFFFFFF)).view(np.int32)


def float32(number):
    return np.full(THREADS, number, np.float32)


def thread_in_warpgroup():
    return np.arange(THREADS, dtype=np.int32)


def opaque(word):
    return word


def synchronize():
    assert _active[-1].all()


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
    _check_convergence()
    return word[np.arange(THREADS) ^ distance]


def from_lane(word, lane):
    _check_convergence()
    return word[np.arange(THREADS) // WARP * WARP + lane]


def over_warp(kind, word):
    _check_convergence()
    reduce = {"add": np.sum, "max": np.max, "min": np.min}[kind]
    return np.repeat(reduce(word.reshape(-1, WARP), axis=1).astype(np.int32), WARP)


def _check_convergence():
    by_warp = _active[-1].reshape(-1, WARP)
    assert (by_warp.all(1) | ~by_warp.any(1)).all()


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
    return word << np.int32(count)


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


def multiply_add_tiles(number, a, b, c):
    """By the figures of the PTX ISA: a lane has row or column lane // 4, and two k or columns from 2 (lane % 4)."""
    _check_convergence()
    lane = np.arange(WARP)
    r, q = lane // 4, 2 * (lane % 4)
    out = [np.zeros(THREADS, np.float32) for _ in c]
    for first in range(0, THREADS, WARP):
        if not _active[-1][first]:
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


def to_int(a):
    return a.astype(np.int32)


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
    offsets = np.where(_active[-1], offsets, 0)
    return [data[offsets[:, None] + 4 * i + np.arange(4)].view(np.int32)[:, 0] for i in range(words)]


def store(ptr, words):
    data, offsets, _ = ptr
    _check_addresses(ptr, len(words))
    for i, word in enumerate(words):
        at = offsets[_active[-1]]
        data[at[:, None] + 4 * i + np.arange(4)] = word[_active[-1], None].view(np.uint8)


def load_transposed(ptr):
    """By the figures of the PTX ISA: every lane points to a row, and gets two numbers of a column of each matrix."""
    _check_convergence()
    data, offsets, _ = ptr
    _check_addresses(ptr, 4)
    # [warp, matrix, row, column]
    matrices = data[offsets[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 4, 8, 8)
    return [np.ascontiguousarray(matrices[:, i].transpose(0, 2, 1)).view(np.int32).reshape(-1) for i in range(4)]


def prefetch(ptr):
    _check_addresses(ptr, 1)


def load_half(ptr):
    data, offsets, _ = ptr
    offsets = np.where(_active[-1], offsets, 0)
    assert (offsets % 2 == 0).all()
    return data[offsets].astype(np.int32) | (data[offsets + 1].astype(np.int32) << 8)


def store_half(ptr, word):
    data, offsets, _ = ptr
    at = offsets[_active[-1]]
    assert (at % 2 == 0).all()
    data[at[:, None] + np.arange(2)] = word[_active[-1], None].view(np.uint8)[:, :2]


def store_byte(ptr, word):
    data, offsets, _ = ptr
    data[offsets[_active[-1]]] = (word & 255).astype(np.uint8)[_active[-1]]


def order_before_copies():
    pass  # nothing is copied while threads work


fence_gpu = order_before_copies  # one block runs at a time


def _check_addresses(ptr, words):
    data, offsets, _ = ptr
    used = offsets[_active[-1]]
    assert (used % (4 * words) == 0).all()
    assert ((used >= 0) & (used + 4 * words <= data.size)).all()


def _count_conflicts(offsets):
    """Eight lanes are served at a time; two that want different words of the same banks wait for each other."""
    for lanes in np.flatnonzero(_active[-1]).reshape(-1, 8) if _active[-1].all() else ():
        quads = np.unique(offsets[lanes] // 16)
        bank_conflicts[0] += np.bincount(quads % 8).max() - 1
