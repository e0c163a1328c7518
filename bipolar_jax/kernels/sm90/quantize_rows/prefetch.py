"""Prefetches what the next kernel reads first to the L2 cache: few rows leave memory idle while they are quantized."""

from __future__ import annotations

import dataclasses

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Shaped

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Value

CHUNK_BYTES = 4096  # of a prefetch: a few for each thread block spread them over all of memory


@dataclasses.dataclass(frozen=True)
class FirstBytes:
    """Which bytes of an array to prefetch: the same ranges of each of its first rows.

    Attributes:
      rows: from the first on.
      row_bytes: of a row, a multiple of 16.
      ranges: of a row.
      spacing: bytes from the start of a range to that of the next, a multiple of 16.
      nbytes: of a range, a multiple of 16.
    """

    rows: int
    row_bytes: int
    ranges: int
    spacing: int
    nbytes: int

    @property
    def chunks(self) -> int:
        """Prefetches of a range."""
        return -(-self.nbytes // CHUNK_BYTES)


Prefetched = tuple[tuple[Shaped[Array, "..."], FirstBytes], ...]


@with_twin(lambda first, array, block, blocks: None)
def prefetch_share(first: FirstBytes, array, block: Int[Array, ""], blocks: int) -> None:
    """Prefetches a block's share of an array's first bytes, from one warpgroup; see `prefetch_chunks`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def inline(_, array, block):
        prefetch_chunks(first, array, scalar_of(block), blocks)

    inline(array, block)


def prefetch_chunks(first: FirstBytes, array, block: Value, blocks: int) -> None:
    """The share of a block's threads: all ranges' first chunks come first, and neighbouring blocks have neighbours.

    Args:
      first: which bytes.
      array: in global memory.
      block: index of the block.
      blocks: that share the array.
    """
    ranges = first.rows * first.ranges
    for start in range(0, ranges * first.chunks, blocks * WARPGROUP):
        index = ptx.plus(ptx.plus(ptx.times(thread_index(), blocks), block), start)
        chunk = ptx.divided(index, ranges)
        in_chunk = ptx.plus(index, ptx.times(chunk, -ranges))
        row = ptx.divided(in_chunk, first.ranges)
        position = ptx.times(ptx.plus(in_chunk, ptx.times(row, -first.ranges)), first.spacing)
        before = ptx.times(chunk, CHUNK_BYTES)
        with ptx.when(ptx.less(index, ranges * first.chunks)):
            at = ptx.advance_far(ptx.pointer(array, ptx.GLOBAL), row, first.row_bytes)
            at = ptx.advance(at, ptx.plus(position, before))
            left = ptx.plus(ptx.times(before, -1), first.nbytes)
            ptx.prefetch_bytes(at, ptx.smaller(left, CHUNK_BYTES))
