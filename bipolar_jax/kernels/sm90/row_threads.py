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

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.instructions import Value

BLOCK = 32
WARP, WARPGROUP = 32, 128
WARPS = WARPGROUP // WARP
_UNROLLED = 2  # times around a loop over blocks

# A visit of a block: its index, its position or None, and the values carried; returns the new values.
Visit = Callable[[Value, Value | None, list[Value]], list[Value]]


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
      threads: that share it, WARP or WARPGROUP.
      index: of the row in the whole array, int32.
      thread: among those that share it; lane: in its warp; int32.
      swizzle: quarter i of a block, in the order of loading, is quarter i ^ swizzle.
    """

    def __init__(self, blocks: int, threads: int, first_row: Value, scratch: Value):
        """Begins with row `first_row`; the scratch is int32 in shared memory, of the warpgroup's own."""
        in_group = gpu.both(mgpu.thread_idx(), WARPGROUP - 1)
        self.blocks, self.threads = blocks, threads
        self.lane = gpu.both(in_group, WARP - 1)
        self.swizzle = gpu.both(gpu.shift_right(self.lane, 1), 3)
        self._warp = gpu.shift_right(in_group, 5)
        self._scratch = gpu.pointer(scratch, gpu.SHARED)
        if threads == WARP:
            self.thread, self.index = self.lane, gpu.plus(first_row, self._warp)
        else:
            self.thread, self.index = in_group, first_row

    def start_in_slot(self, slot: Value, number: str) -> Value:
        """Where in the slot this row begins."""
        start = gpu.pointer(slot, gpu.SHARED)
        if self.threads == WARPGROUP:
            return start
        return gpu.advance(start, gpu.times(self._warp, self.blocks * block_bytes(number)))

    def load(self, start: Value, number: str, block: Value) -> list[list[Value]]:
        """Words of a block, a quarter (8 numbers) at a time, in this thread's order."""
        quarter = block_bytes(number) // 4
        block_start = gpu.advance(start, gpu.times(block, 4 * quarter))
        quarters = []
        for i in range(4):
            at = gpu.advance(block_start, gpu.times(gpu.flip(self.swizzle, i), quarter))
            quarters.append([word for offset in range(0, quarter, 16) for word in gpu.load(gpu.advance(at, offset), 4)])
        return quarters

    def load_numbers(self, start: Value, number: str, block: Value) -> list[list[Value]]:
        """As `load`, the numbers as float32."""
        return [[n for word in q for n in gpu.expand(number, word)] for q in self.load(start, number, block)]

    def over_blocks(self, visit: Visit, values: list[Value], *, wanted: int, partial: bool = False) -> list[Value]:
        """Carries values over this thread's part of `wanted` blocks, which may be more than there are.

        Wherever all is well a visit's position is None. It is given where a thread may have
        no block left: it is then the block that it would have, and the block visited is the
        last. With `partial` it is also given for the last block.
        """
        full = (self.blocks - partial) // self.threads
        if full <= _UNROLLED:
            for i in range(full):
                values = visit(gpu.plus(self.thread, i * self.threads), None, values)
        else:

            @mgpu.fori(gpu.int32(full), values)
            def loop(i, values):
                return visit(gpu.plus(self.thread, gpu.times(i, self.threads)), None, values)

            values = list(loop.results)
        if wanted == full * self.threads:
            return values
        position = gpu.plus(self.thread, full * self.threads)
        block = arith.minsi(position, gpu.int32(self.blocks - 1))
        # Whole warps, since lanes exchange words.
        branch = scf.IfOp(
            gpu.compare("slt", gpu.flip(position, self.lane), gpu.int32(wanted)),
            [value.type for value in values],
            has_else=True,
        )
        with ir.InsertionPoint(branch.then_block):
            scf.YieldOp(visit(block, position, values))
        with ir.InsertionPoint(branch.else_block):
            scf.YieldOp(values)
        return list(branch.results)

    def share(self, place: int, word: Value) -> None:
        """Writes a warp's word to the scratch, where the others find it after a barrier."""
        with mgpu.when(gpu.compare("eq", self.lane, gpu.int32(0))):
            gpu.store(gpu.advance(self._scratch, gpu.times(gpu.plus(self._warp, place), 4)), [word])

    def shared(self, place: int) -> list[Value]:
        """What the warps shared."""
        return gpu.load(gpu.advance(self._scratch, 4 * place), WARPS)

    def combine(self, combine: Callable[[Value, Value], Value], words: dict[int, Value]) -> list[Value]:
        """Each word combined over the threads of the row; the keys are places in the scratch."""
        for distance in (16, 8, 4, 2, 1):
            words = {place: combine(word, gpu.exchange(word, distance)) for place, word in words.items()}
        if self.threads == WARPGROUP:
            for place, word in words.items():
                self.share(place, word)
            mgpu.warpgroup_barrier()
            words = {place: tree(combine, self.shared(place)) for place in words}
        return list(words.values())

    def write(self, vector: Value, word: Value) -> None:
        """Writes the row's element of a vector in global memory, from one thread."""
        with mgpu.when(gpu.compare("eq", self.thread, gpu.int32(0))):
            gpu.store(gpu.advance(gpu.pointer(vector, gpu.GLOBAL), gpu.times(self.index, 4)), [word])

    def write_word(self, words: Value, plane: int, row_bytes: int, plane_bytes: int, position: Value, word: Value):
        """Writes a word of a plane in global memory."""
        start = gpu.advance(self._row_start(words, row_bytes), gpu.int64(plane * plane_bytes))
        gpu.store(gpu.advance(start, gpu.times(position, 4)), [word])

    def write_eight(self, words: Value, row_bytes: int, position: Value, eight: list[Value], *, careful: bool) -> None:
        """Writes 8 words for each block in global memory.

        Two lanes write the 32 bytes of one block, then those of the other: each half a block
        by itself would cost the memory a whole sector.
        """
        odd = gpu.compare("ne", gpu.both(self.lane, 1), gpu.int32(0))
        low, high = eight[:4], eight[4:]
        received = [gpu.exchange(gpu.choose(odd, a, b), 1) for a, b in zip(low, high, strict=True)]
        even_block = [gpu.choose(odd, r, a) for r, a in zip(received, low, strict=True)]
        odd_block = [gpu.choose(odd, b, r) for r, b in zip(received, high, strict=True)]
        offset = gpu.plus(gpu.times(gpu.both(position, 0xFFFFFFFE), 32), gpu.times(gpu.both(self.lane, 1), 16))
        start = gpu.advance(self._row_start(words, row_bytes), offset)
        for i, half in enumerate((even_block, odd_block)):
            if careful:
                block = gpu.plus(gpu.both(position, 0xFFFFFFFE), i)
                with mgpu.when(gpu.compare("slt", block, gpu.int32(self.blocks))):
                    gpu.store(gpu.advance(start, 32 * i), half)
            else:
                gpu.store(gpu.advance(start, 32 * i), half)

    def _row_start(self, words: Value, row_bytes: int) -> Value:
        offset = arith.muli(arith.extui(ir.IntegerType.get_signless(64), self.index), gpu.int64(row_bytes))
        return gpu.advance(gpu.pointer(words, gpu.GLOBAL), offset)


def block_bytes(number: str) -> int:
    """Of a block of 32 numbers."""
    return BLOCK * (4 if number == "f32" else 2)
