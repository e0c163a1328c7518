"""How the threads of a warpgroup share a row of activations in shared memory.

A row belongs to all 128 threads, to the 32 of a warp, or to 8. Each takes blocks of 32 numbers,
which make one word of every bit plane; neighbours take neighbouring blocks, so that they write
neighbouring words.

Blocks of 16-bit numbers are 64 bytes apart: were all threads to load the same 16 bytes of their
blocks, they would meet in the same banks. So each loads the quarters of its block in an order
of its own (`swizzle`), and the words made of them are put in order when they are packed, which
costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import tree
from bipolar_jax.kernels.sm90.core.hardware import WARP, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value

BLOCK = 32
_UNROLLED = 2  # times around a loop over blocks
SCRATCH_WORDS = 20  # of shared memory for a warpgroup's sums and extremes over its four warps
HIGH, LOW, CODE_SUM, SQUARES, SUM = 0, 4, 8, 12, 16  # where in it: what was combined may be read until the row ends

# A visit to a block: its index, its position or None, and the values carried; returns the new values.
Visit = Callable[[Value, Value | None, list[Value]], list[Value]]


def block_bytes(number: str) -> int:
    """Of a block of numbers, "f32" or 16 bits."""
    return BLOCK * (4 if number == "f32" else 2)


class RowThreads:
    """One row, as one of its threads sees it.

    Attributes:
      blocks: in a row.
      index: of the row in the whole array, int32.
      swizzle: quarter i of a block, in the order of loading, is quarter i ^ swizzle.
    """

    def __init__(self, m: int, blocks: int, threads: int, first_row: Value, scratch: Value):
        """One of the slot's rows.

        Args:
          m: rows of the whole array; what a slot has beyond them is never written.
          blocks: in a row.
          threads: that share a row, a power of two.
          first_row: of the slot, int32.
          scratch: int32 in shared memory, of the warpgroup's own.
        """
        in_group = ptx.thread_in_warpgroup()
        self.blocks, self._threads = blocks, threads
        self._lane = ptx.bits_of(in_group, WARP - 1)
        self._warp = ptx.shift_right(in_group, WARP.bit_length() - 1)
        self._scratch = ptx.pointer(scratch, ptx.SHARED)
        self.swizzle = ptx.bits_of(ptx.shift_right(self._lane, 1), 3)
        self._thread = ptx.bits_of(in_group, threads - 1)
        self._row_in_slot = ptx.shift_right(in_group, threads.bit_length() - 1)
        self.index = ptx.plus(first_row, self._row_in_slot)
        self._exists = ptx.less(self.index, m) if m % (WARPGROUP // threads) else None

    def start_in_slot(self, slot: Value, number: str, parts: int) -> Pointer:
        """Where in the slot the row begins, of so many parts, each of its blocks."""
        start = ptx.pointer(slot, ptx.SHARED)
        if self._threads == WARPGROUP:
            return start
        return ptx.advance(start, ptx.times(self._row_in_slot, parts * self.blocks * block_bytes(number)))

    def next_part(self, start: Pointer, number: str) -> Pointer:
        """Where the part after the one that starts there begins."""
        return ptx.advance(start, self.blocks * block_bytes(number))

    def load(self, start: Pointer, number: str, block: Value) -> list[list[Value]]:
        """Words of a block, a quarter (8 numbers) at a time, in this thread's order."""
        return [
            [word for offset in range(0, block_bytes(number) // 4, 16) for word in ptx.load(ptx.advance(at, offset), 4)]
            for at in self._quarters(start, number, block)
        ]

    def store(self, start: Pointer, number: str, block: Value, position: Value | None, quarters: list[list[Value]]):
        """Writes what `load` loads, if the thread has a block at the position."""
        with contextlib.nullcontext() if position is None else ptx.when(ptx.less(position, self.blocks)):
            for at, words in zip(self._quarters(start, number, block), quarters, strict=True):
                for i in range(0, len(words), 4):
                    ptx.store(ptx.advance(at, 4 * i), words[i : i + 4])

    def _quarters(self, start: Pointer, number: str, block: Value) -> list[Pointer]:
        quarter = block_bytes(number) // 4
        block_start = ptx.advance(start, ptx.times(block, 4 * quarter))
        return [ptx.advance(block_start, ptx.times(ptx.flip_bits(self.swizzle, i), quarter)) for i in range(4)]

    def first_of(self, numbers: list[list[Value]], count: Value) -> list[list[Value]]:
        """A block's numbers, 0 in place of those that come after the first `count`."""
        firsts = [ptx.times(ptx.flip_bits(self.swizzle, i), 8) for i in range(4)]
        return [
            [ptx.choose(ptx.less(ptx.plus(first, j), count), x, ptx.float32(0)) for j, x in enumerate(q)]
            for first, q in zip(firsts, numbers, strict=True)
        ]

    def load_numbers(self, start: Pointer, number: str, block: Value) -> list[list[Value]]:
        """As `load`, the numbers as float32."""
        return [[n for word in q for n in ptx.expand(number, word)] for q in self.load(start, number, block)]

    def over_blocks(self, visit: Visit, values: list[Value], *, wanted: int, partial: bool = False) -> list[Value]:
        """Carries values over this thread's part of `wanted` blocks, which may be more than there are.

        A visit's position is None where nothing needs care. It is given where a thread may
        have no block left: it is then the block that it would have, and the block visited is
        the last one. With `partial` it is also given for the last block.
        """
        full = (self.blocks - partial) // self._threads
        if full <= _UNROLLED:
            for i in range(full):
                values = visit(ptx.plus(self._thread, i * self._threads), None, values)
        else:
            values = ptx.repeat(
                full, values, lambda i, v: visit(ptx.plus(self._thread, ptx.times(i, self._threads)), None, v)
            )
        if wanted == full * self._threads:
            return values
        position = ptx.plus(self._thread, full * self._threads)
        block = ptx.smaller(position, self.blocks - 1)
        if self._threads <= WARP:
            return visit(block, position, values)
        # Whole warps, since lanes exchange words.
        first_of_warp = ptx.flip_bits(position, self._lane)
        return ptx.update_if(ptx.less(first_of_warp, wanted), values, lambda: visit(block, position, values))

    def combine(self, combine: Callable[[Value, Value], Value], words: dict[int, Value]) -> list[Value]:
        """Each word combined over the threads of the row; the keys are places in the scratch.

        A warpgroup's threads wait for each other.
        """
        distance = min(self._threads, WARP) // 2
        while distance:
            words = {place: combine(word, ptx.exchange(word, distance)) for place, word in words.items()}
            distance //= 2
        if self._threads == WARPGROUP:
            with ptx.when(ptx.equal(self._lane, 0)):
                for place, word in words.items():
                    ptx.store(ptx.advance(self._scratch, ptx.times(ptx.plus(self._warp, place), 4)), [word])
            ptx.synchronize()
            words = {
                place: tree(combine, ptx.load(ptx.advance(self._scratch, 4 * place), WARPGROUP // WARP))
                for place in words
            }
        return list(words.values())

    def leave(self) -> None:
        """After it the slot may be filled anew; a warpgroup with one row has waited in `combine`."""
        if self._threads < WARPGROUP:
            ptx.synchronize()

    def write(self, vector: Value, word: Value) -> None:
        """Writes the row's element of a vector in global memory, from one thread."""
        start = ptx.advance_far(ptx.pointer(vector, ptx.GLOBAL), self.index, 4)
        with ptx.when(ptx.equal(self._thread, 0)):
            self._store(start, [word], None)

    def write_planes(self, row_start: Pointer, position: Value, planes: list[Value], stride: int, limit: int | None):
        """Writes a word of every plane, `stride` bytes apart, at a position of the row that is below the limit."""
        start = ptx.advance(row_start, ptx.times(position, 4))
        for i, plane in enumerate(planes):
            self._store(
                ptx.advance_far(start, i, stride), [plane], None if limit is None else ptx.less(position, limit)
            )

    def write_eight(self, row_start: Pointer, position: Value, eight: list[Value], limit: int | None) -> None:
        """Writes 8 words for each position of a row in global memory that is below the limit.

        Two lanes write the 32 bytes of one position, then those of the other: each half of a
        sector by itself would cost as much as a whole one.
        """
        odd_lane = ptx.bits_of(self._lane, 1)
        odd, even_position = ptx.equal(odd_lane, 1), ptx.flip_bits(position, odd_lane)
        low, high = eight[:4], eight[4:]
        received = [ptx.exchange(ptx.choose(odd, a, b), 1) for a, b in zip(low, high, strict=True)]
        halves = (
            [ptx.choose(odd, r, a) for r, a in zip(received, low, strict=True)],
            [ptx.choose(odd, b, r) for r, b in zip(received, high, strict=True)],
        )
        start = ptx.advance(row_start, ptx.plus(ptx.times(even_position, 32), ptx.times(odd_lane, 16)))
        for i, half in enumerate(halves):
            inside = None if limit is None else ptx.less(ptx.plus(even_position, i), limit)
            self._store(ptx.advance(start, 32 * i), half, inside)

    def _store(self, at: Pointer, words: list[Value], inside: Value | None) -> None:
        """Writes words of the row, if it exists, where it is inside."""
        with contextlib.ExitStack() as conditions:
            for condition in (self._exists, inside):
                if condition is not None:
                    conditions.enter_context(ptx.when(condition))
            ptx.store(at, words)
