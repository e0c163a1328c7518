"""How the threads of a warpgroup share a row of activations in shared memory.

A row belongs to the 32 threads of a warp or to all 128. Each takes blocks of 32 numbers, which
make one word of every bit plane; neighbours take neighbouring blocks, so that a warp writes 128
bytes of a plane at once.

Blocks of 16-bit numbers are 64 bytes apart: were all threads to load the same 16 bytes of their
blocks, they would meet in the same banks. So each loads the quarters of its block in an order
of its own (`swizzle`), and the words made of them are put in order when they are packed, which
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.instructions import Pointer, Value

BLOCK = 32
WARP, WARPGROUP = 32, 128
WARPS = WARPGROUP // WARP
_UNROLLED = 2  # times around a loop over blocks

# A visit to a block: its index, its position or None, and the values carried; returns the new values.
Visit = Callable[[Value, Value | None, list[Value]], list[Value]]


def block_bytes(number: str) -> int:
    """Of a block of numbers, "f32" or 16 bits."""
    return BLOCK * (4 if number == "f32" else 2)


def tree(combine: Callable[[Value, Value], Value], values: list[Value]) -> Value:
    """All values combined, in few steps that wait for each other."""
    while len(values) > 1:
        pairs = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(values) & ~1 :]
    return values[0]


class RowThreads:
    """One row, as one of its threads sees it.

    Attributes:
      blocks: in a row.
      index: of the row in the whole array, int32.
      swizzle: quarter i of a block, in the order of loading, is quarter i ^ swizzle.
    """

    def __init__(self, blocks: int, threads: int, first_row: Value, scratch: Value):
        """One of the slot's rows.

        Args:
          blocks: in a row.
          threads: that share a row, WARP or WARPGROUP.
          first_row: of the slot, int32.
          scratch: int32 in shared memory, of the warpgroup's own.
        """
        in_group = gpu.thread_in_warpgroup()
        self.blocks, self._threads = blocks, threads
        self._lane = gpu.bits_of(in_group, WARP - 1)
        self._warp = gpu.shift_right(in_group, 5)
        self._scratch = gpu.pointer(scratch, gpu.SHARED)
        self.swizzle = gpu.bits_of(gpu.shift_right(self._lane, 1), 3)
        if threads == WARP:
            self._thread, self.index = self._lane, gpu.plus(first_row, self._warp)
        else:
            self._thread, self.index = in_group, first_row

    def start_in_slot(self, slot: Value, number: str) -> Pointer:
        """Where in the slot the row begins."""
        start = gpu.pointer(slot, gpu.SHARED)
        if self._threads == WARPGROUP:
            return start
        return gpu.advance(start, gpu.times(self._warp, self.blocks * block_bytes(number)))

    def load(self, start: Pointer, number: str, block: Value) -> list[list[Value]]:
        """Words of a block, a quarter (8 numbers) at a time, in this thread's order."""
        quarter = block_bytes(number) // 4
        block_start = gpu.advance(start, gpu.times(block, 4 * quarter))
        quarters = []
        for i in range(4):
            at = gpu.advance(block_start, gpu.times(gpu.flip_bits(self.swizzle, i), quarter))
            quarters.append([word for offset in range(0, quarter, 16) for word in gpu.load(gpu.advance(at, offset), 4)])
        return quarters

    def load_numbers(self, start: Pointer, number: str, block: Value) -> list[list[Value]]:
        """As `load`, the numbers as float32."""
        return [[n for word in q for n in gpu.expand(number, word)] for q in self.load(start, number, block)]

    def over_blocks(self, visit: Visit, values: list[Value], *, wanted: int, partial: bool = False) -> list[Value]:
        """Carries values over this thread's part of `wanted` blocks, which may be more than there are.

        A visit's position is None where nothing needs care. It is given where a thread may
        have no block left: it is then the block that it would have, and the block visited is
        the last one. With `partial` it is also given for the last block.
        """
        full = (self.blocks - partial) // self._threads
        if full <= _UNROLLED:
            for i in range(full):
                values = visit(gpu.plus(self._thread, i * self._threads), None, values)
        else:
            values = gpu.repeat(
                full, values, lambda i, v: visit(gpu.plus(self._thread, gpu.times(i, self._threads)), None, v)
            )
        if wanted == full * self._threads:
            return values
        position = gpu.plus(self._thread, full * self._threads)
        block = gpu.smaller(position, self.blocks - 1)
        # Whole warps, since lanes exchange words.
        first_of_warp = gpu.flip_bits(position, self._lane)
        return gpu.update_if(gpu.less(first_of_warp, wanted), values, lambda: visit(block, position, values))

    def share(self, place: int, word: Value) -> None:
        """Writes a warp's word to the scratch, where the others find it after a barrier."""
        with gpu.when(gpu.equal(self._lane, 0)):
            gpu.store(gpu.advance(self._scratch, gpu.times(gpu.plus(self._warp, place), 4)), [word])

    def shared(self, place: int) -> list[Value]:
        """What the warps shared."""
        return gpu.load(gpu.advance(self._scratch, 4 * place), WARPS)

    def combine(self, combine: Callable[[Value, Value], Value], words: dict[int, Value]) -> list[Value]:
        """Each word combined over the threads of the row; the keys are places in the scratch."""
        for distance in (16, 8, 4, 2, 1):
            words = {place: combine(word, gpu.exchange(word, distance)) for place, word in words.items()}
        if self._threads == WARPGROUP:
            for place, word in words.items():
                self.share(place, word)
            gpu.synchronize()
            words = {place: tree(combine, self.shared(place)) for place in words}
        return list(words.values())

    def write(self, vector: Value, word: Value) -> None:
        """Writes the row's element of a vector in global memory, from one thread."""
        with gpu.when(gpu.equal(self._thread, 0)):
            gpu.store(gpu.advance_far(gpu.pointer(vector, gpu.GLOBAL), self.index, 4), [word])

    def write_eight(self, row_start: Pointer, position: Value, eight: list[Value], limit: int | None) -> None:
        """Writes 8 words for each position of a row in global memory that is below the limit.

        Two lanes write the 32 bytes of one position, then those of the other: each half of a
        sector by itself would cost as much as a whole one.
        """
        odd_lane = gpu.bits_of(self._lane, 1)
        odd, even_position = gpu.equal(odd_lane, 1), gpu.flip_bits(position, odd_lane)
        low, high = eight[:4], eight[4:]
        received = [gpu.exchange(gpu.choose(odd, a, b), 1) for a, b in zip(low, high, strict=True)]
        halves = (
            [gpu.choose(odd, r, a) for r, a in zip(received, low, strict=True)],
            [gpu.choose(odd, b, r) for r, b in zip(received, high, strict=True)],
        )
        start = gpu.advance(row_start, gpu.plus(gpu.times(even_position, 32), gpu.times(odd_lane, 16)))
        for i, half in enumerate(halves):
            if limit is None:
                gpu.store(gpu.advance(start, 32 * i), half)
            else:
                with gpu.when(gpu.less(gpu.plus(even_position, i), limit)):
                    gpu.store(gpu.advance(start, 32 * i), half)
