"""How the threads of a warpgroup share a row of activations in shared memory.

A row belongs to all 128 threads, to the 32 of a warp, or to 8. Each thread takes blocks of 32 numbers, which make one
word of every bit plane; neighbouring threads take neighbouring blocks, so that they write neighbouring words.

Blocks of 16-bit numbers are 64 bytes apart: threads that all load the same quarter of their blocks have bank conflicts.
So each thread loads the quarters of its block in its own order (`swizzle`). The byte order of the packing step undoes
that at no cost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from bipolar_jax.kernels.sm90.arithmetic.butterflies import rotate_numbers
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import tree
from bipolar_jax.kernels.sm90.core.hardware import WARP, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import GLOBAL, SHARED, Pointer, Value

BLOCK = 32  # numbers
# Loops over blocks of at most so many iterations are unrolled; so many of a row in global memory, whose words then stay
# in registers from visit to visit.
_UNROLLED, _UNROLLED_IN_MEMORY = 2, 4
_MOST_KEPT = 8  # blocks of 16-bit numbers, 16 registers each
SCRATCH_WORDS = 20  # shared memory for a warpgroup's sums and extremes over its four warps
# Offsets into the scratch. They do not overlap: slow warps may read one result while fast ones write the next.
HIGH, LOW, CODE_SUM, SQUARES, SUM = 0, 4, 8, 12, 16


class Combination(NamedTuple):
    """How the words of several threads become one.

    Attributes:
      pair: the word of two.
      over_warp: the same of a warp's lanes in one instruction, see `ptx.over_warp`; or None.
    """

    pair: Callable[[Value, Value], Value]
    over_warp: str | None = None


SUM_OF_INTEGERS = Combination(lambda a, b: ptx.plus(a, b), "add")
SUM_OF_FLOATS = Combination(lambda a, b: ptx.as_word(ptx.add(ptx.as_float(a), ptx.as_float(b))))
# Of floats that have no sign: their words have the same order, with NaN above all others.
LARGEST_FLOAT = Combination(lambda a, b: ptx.extreme("max", "f32", a, b), "max")

# visit(block, position or None, carried values) returns the new values; see `RowThreads.over_blocks`.
Visit = Callable[[Value, Value | None, list[Value]], list[Value]]


def block_bytes(ptx_type: str) -> int:
    """Bytes of a block of numbers."""
    return BLOCK * (4 if ptx_type == "f32" else 2)


class RowThreads:
    """One row, from the point of view of one of its threads.

    Attributes:
      blocks: blocks in a row.
      index: of the row in the whole array, int32.
      swizzle: the i-th quarter of a block that this thread loads is quarter i ^ swizzle.
    """

    def __init__(self, m: int, blocks: int, threads: int, first_row: Value, scratch: Value, space: int = SHARED):
        """The row of the slot that this thread belongs to.

        Args:
          m: rows of the whole array; rows of a slot beyond them are not written.
          blocks: blocks in a row.
          threads: threads that share a row, a power of two.
          first_row: index of the slot's first row, int32.
          scratch: int32 [SCRATCH_WORDS] in shared memory, private to the warpgroup.
          space: SHARED or GLOBAL, where the slot and the prologue's vectors are.
        """
        in_group = ptx.thread_in_warpgroup()
        self.blocks, self.space, self._threads = blocks, space, threads
        self._lane = ptx.bits_of(in_group, WARP - 1)
        self._warp = ptx.shift_right(in_group, WARP.bit_length() - 1)
        self._scratch = ptx.pointer(scratch, ptx.SHARED)
        self.swizzle = ptx.bits_of(ptx.shift_right(self._lane, 1), 3)
        self._thread = ptx.bits_of(in_group, threads - 1)
        self._row_in_slot = ptx.shift_right(in_group, threads.bit_length() - 1)
        self.index = ptx.plus(first_row, self._row_in_slot)
        self._own_blocks: list[Value] = []  # that all threads have
        # By the identity of address and block, which are kept beside the words: another object may not get theirs.
        self._kept: dict[tuple[int, int], tuple[Pointer, Value, list[list[Value]]]] = {}
        self._exists = ptx.less(self.index, m) if m % (WARPGROUP // threads) else None

    def start_in_slot(self, slot: Value, ptx_type: str, parts: int) -> Pointer:
        """The address of the row in the slot; a row has `parts` parts of `blocks` blocks each."""
        start = ptx.pointer(slot, self.space)
        if self._threads == WARPGROUP:
            return start
        return ptx.advance(start, ptx.times(self._row_in_slot, parts * self.blocks * block_bytes(ptx_type)))

    def next_part(self, start: Pointer, ptx_type: str) -> Pointer:
        """The address of the part after the one at `start`."""
        return ptx.advance(start, self.blocks * block_bytes(ptx_type))

    def load(self, start: Pointer, ptx_type: str, block: Value) -> list[list[Value]]:
        """Words of a block: four quarters of 8 numbers, in this thread's order."""
        key = id(start), id(block)
        if key in self._kept:
            return self._kept[key][-1]
        words = [
            [
                word
                for offset in range(0, block_bytes(ptx_type) // 4, 16)
                for word in ptx.load(ptx.advance(at, offset), 4)
            ]
            for at in self._quarters(start, ptx_type, block)
        ]
        at_most = _MOST_KEPT * block_bytes("bf16") // block_bytes(ptx_type)
        if self.space == GLOBAL and len(self._kept) < at_most and any(block is own for own in self._own_blocks):
            self._kept[key] = start, block, words
        return words

    def store(self, start: Pointer, ptx_type: str, block: Value, position: Value | None, quarters: list[list[Value]]):
        """Stores words in the order of `load`, if the thread has a block at the position."""
        with contextlib.nullcontext() if position is None else ptx.when(ptx.less(position, self.blocks)):
            for at, words in zip(self._quarters(start, ptx_type, block), quarters, strict=True):
                for i in range(0, len(words), 4):
                    ptx.store(ptx.advance(at, 4 * i), words[i : i + 4])

    def _quarters(self, start: Pointer, ptx_type: str, block: Value) -> list[Pointer]:
        quarter = block_bytes(ptx_type) // 4
        block_start = ptx.advance(start, ptx.times(block, 4 * quarter))
        return [ptx.advance(block_start, ptx.times(ptx.flip_bits(self.swizzle, i), quarter)) for i in range(4)]

    def first_of(self, numbers: list[list[Value]], count: Value) -> list[list[Value]]:
        """A block's numbers, with 0 in place of all but the first `count`."""
        firsts = [ptx.times(ptx.flip_bits(self.swizzle, i), 8) for i in range(4)]
        return [
            [ptx.choose(ptx.less(ptx.plus(first, j), count), x, ptx.float32(0)) for j, x in enumerate(q)]
            for first, q in zip(firsts, numbers, strict=True)
        ]

    def load_numbers(self, start: Pointer, ptx_type: str, block: Value) -> list[list[Value]]:
        """The numbers of a block as float32, in the order of `load`."""
        return [[n for word in q for n in ptx.expand(ptx_type, word)] for q in self.load(start, ptx_type, block)]

    def rotate(self, numbers: list[list[Value]], block: int) -> list[list[Value]]:
        """The numbers of this thread's block of 32, in the order of `load`, after a rotation of blocks of `block`.

        All lanes of the warp take part. Rows have whole blocks: lanes without one rotate what is not used.
        """
        flat = rotate_numbers([x for quarter in numbers for x in quarter], block, self._lane, self.swizzle)
        return [flat[i : i + 8] for i in range(0, BLOCK, 8)]

    def over_blocks(self, visit: Visit, values: list[Value], *, wanted: int, partial: bool = False) -> list[Value]:
        """Visits this thread's blocks, and carries values from one visit to the next.

        Args:
          visit: called with a block's index, its position, and the values. The position is None where every thread has
            a block. Otherwise a thread may have none left: the position is the index that its block would have, and the
            block is the last one of the row.
          values: carried from visit to visit.
          wanted: positions that must be visited, at least `blocks`.
          partial: also give a position for the last block, which is not full.
        """
        full = (self.blocks - partial) // self._threads
        if full <= (_UNROLLED_IN_MEMORY if self.space == GLOBAL else _UNROLLED):
            for i in range(full):
                if i == len(self._own_blocks):
                    self._own_blocks.append(ptx.plus(self._thread, i * self._threads))
                values = visit(self._own_blocks[i], None, values)
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

    def combine(self, words: dict[int, tuple[Combination, Value]]) -> list[Value]:
        """Each word combined over the threads of the row; the keys are offsets into the scratch.

        With 128 threads a row, they meet at a barrier.
        """
        combinations = {offset: how for offset, (how, _) in words.items()}
        words = {offset: word for offset, (_, word) in words.items()}
        at_once = [offset for offset, how in combinations.items() if how.over_warp and self._threads >= WARP]
        for offset in at_once:
            words[offset] = ptx.over_warp(combinations[offset].over_warp, words[offset])
        distance = min(self._threads, WARP) // 2
        while distance:
            for offset, how in combinations.items():
                if offset not in at_once:
                    words[offset] = how.pair(words[offset], ptx.exchange(words[offset], distance))
            distance //= 2
        if self._threads == WARPGROUP:
            with ptx.when(ptx.equal(self._lane, 0)):
                for offset, word in words.items():
                    ptx.store(ptx.advance(self._scratch, ptx.times(ptx.plus(self._warp, offset), 4)), [word])
            ptx.synchronize()
            words = {
                offset: tree(how.pair, ptx.load(ptx.advance(self._scratch, 4 * offset), WARPGROUP // WARP))
                for offset, how in combinations.items()
            }
        return list(words.values())

    def leave(self) -> None:
        """Waits until no thread reads the slot; with one row a warpgroup the barrier of `combine` has done so."""
        if self._threads < WARPGROUP:
            ptx.synchronize()

    def write(self, vector: Value, word: Value) -> None:
        """Stores the row's element of a vector in global memory, from one thread."""
        start = ptx.advance_far(ptx.pointer(vector, ptx.GLOBAL), self.index, 4)
        with ptx.when(ptx.equal(self._thread, 0)):
            self._store(start, [word], None)

    def write_planes(self, row_start: Pointer, position: Value, planes: list[Value], stride: int, limit: int | None):
        """Stores a word of every plane, `stride` bytes apart, at a position of the row, if it is below the limit."""
        start = ptx.advance(row_start, ptx.times(position, 4))
        for i, plane in enumerate(planes):
            self._store(
                ptx.advance_far(start, i, stride), [plane], None if limit is None else ptx.less(position, limit)
            )

    def write_eight(self, row_start: Pointer, position: Value, eight: list[Value], limit: int | None) -> None:
        """Stores 8 words at a position of a row in global memory, if it is below the limit.

        Two lanes together store the 32 bytes of one lane's position, then those of the other's: a store of half a
        sector costs as much as one of a whole sector.
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
        """Stores words if the row exists and `inside` holds."""
        with contextlib.ExitStack() as conditions:
            for condition in (self._exists, inside):
                if condition is not None:
                    conditions.enter_context(ptx.when(condition))
            ptx.store(at, words)
