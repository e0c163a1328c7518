"""Rotations by Hadamard matrices within a warp, whose lanes have some numbers each, and of vectors of a warpgroup.

The stages are those of `kernels.semantics.hadamard`: numbers a and b, 2^s apart, become a + b and a - b. Stages of
numbers that a thread has are additions; others exchange numbers between lanes. A factor of 1 or -1 chooses between the
sum and the difference: a fused multiply-add rounds once, so that the bits are those of an addition.
"""

from __future__ import annotations

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.hardware import WARP, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value


def rotate_numbers(
    numbers: list[Value], block: int, lane: Value, swizzle: Value | None = None, first: int = 1
) -> list[Value]:
    """The rotation of blocks of consecutive numbers, or what its stages before `first` leave of it.

    Arguments are those of `stages_of_warp`.
    """
    factor = ptx.float32(block**-0.5)
    return [ptx.multiply(x, factor) for x in stages_of_warp(numbers, block, lane, swizzle, first)]


def stages_of_warp(
    numbers: list[Value], block: int, lane: Value, swizzle: Value | None = None, first: int = 1
) -> list[Value]:
    """The stages of blocks of consecutive numbers, of which consecutive lanes have runs; all lanes take part.

    Args:
      numbers: float32, a power of two of them.
      block: numbers of a block, a power of two, at most WARP times those of a thread.
      lane: of the thread.
      swizzle: where the numbers are 32 in quarters of 8, and the i-th quarter that a thread has is quarter i ^ swizzle:
        bits 1 and 2 of the lane, see `quantize_rows.row_threads`. None where they are in order.
      first: distance of the first stage, a power of two.
    """
    count = len(numbers)
    if block > WARP * count:
        raise ValueError(f"blocks of {block} numbers exceed a warp whose lanes have {count} each")
    distance = first
    while distance < min(block, count):
        signs = None if swizzle is None or distance < 8 else _sign(ptx.bits_of(swizzle, distance // 8))
        numbers = _within_thread(numbers, distance, signs)
        distance *= 2
    while distance < block:
        lanes = distance // count
        sign = _sign(ptx.bits_of(lane, lanes))
        # The other lane's swizzle differs in that bit, and so does the place of its quarter.
        elsewhere = 8 * (lanes // 2) if swizzle is not None and lanes in (2, 4) else 0
        numbers = [
            ptx.fma(x, sign, ptx.as_float(ptx.exchange(ptx.as_word(numbers[i ^ elsewhere]), lanes)))
            for i, x in enumerate(numbers)
        ]
        distance *= 2
    return numbers


def rotate_vectors(scratch: Pointer, numbers: list[Value], size: int, thread: Value) -> list[Value]:
    """Rotations of vectors; arguments as of `stages_of_vectors`."""
    factor = ptx.float32(size**-0.5)
    return [ptx.multiply(x, factor) for x in stages_of_vectors(scratch, numbers, size, thread)]


def stages_of_vectors(scratch: Pointer, numbers: list[Value], size: int, thread: Value) -> list[Value]:
    """All stages of vectors of which every thread of a warpgroup has one number; all threads take part.

    They meet once if blocks are larger than a warp.

    Args:
      scratch: shared memory of this warpgroup, 128 numbers for each vector. A thread reads what others wrote: these may
        write again after the next barrier.
      numbers: float32, one of each vector.
      size: numbers of a block, a power of two up to 128.
      thread: of the warpgroup.
    """
    lane = ptx.bits_of(thread, WARP - 1)
    numbers = [stages_of_warp([x], min(size, WARP), lane)[0] for x in numbers]
    if size <= WARP:
        return numbers
    rows = [ptx.advance(scratch, 4 * WARPGROUP * i) for i in range(len(numbers))]
    for row, x in zip(rows, numbers, strict=True):
        ptx.store(ptx.advance(row, ptx.times(thread, 4)), [ptx.as_word(x)])
    ptx.synchronize()
    return [_between_warps(row, x, thread, size) for row, x in zip(rows, numbers, strict=True)]


def _between_warps(row: Pointer, own: Value, thread: Value, size: int) -> Value:
    """The stages of distances 32 and 64 of a thread's number."""

    def of_thread(distance: int) -> Value:
        (word,) = ptx.load(ptx.advance(row, ptx.times(ptx.flip_bits(thread, distance), 4)), 1)
        return ptx.as_float(word)

    sign = _sign(ptx.bits_of(thread, WARP))
    number = ptx.fma(own, sign, of_thread(WARP))
    if size == WARPGROUP:
        other = ptx.fma(of_thread(2 * WARP), sign, of_thread(3 * WARP))
        number = ptx.fma(number, _sign(ptx.bits_of(thread, 2 * WARP)), other)
    return number


def _sign(bit: Value) -> Value:
    """1 where a bit is 0, else -1: the factor of a number in the stage of that bit of its place."""
    return ptx.choose(ptx.equal(bit, 0), ptx.float32(1), ptx.float32(-1))


def _within_thread(numbers: list[Value], distance: int, sign: Value | None) -> list[Value]:
    """One stage of numbers that a thread has; with a sign of -1 the later number of a pair is a, the earlier b."""
    stage = list(numbers)
    minus = None if sign is None else ptx.multiply(sign, ptx.float32(-1))
    for i in range(len(numbers)):
        if i & distance:
            continue
        first, second = numbers[i], numbers[i + distance]
        if sign is None:
            stage[i], stage[i + distance] = ptx.add(first, second), ptx.subtract(first, second)
        else:
            stage[i], stage[i + distance] = ptx.fma(first, sign, second), ptx.fma(second, minus, first)
    return stage
