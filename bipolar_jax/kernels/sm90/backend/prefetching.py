"""What a product of few tokens reads first of its weights: it is prefetched while the tokens are quantized."""

from __future__ import annotations

import math

from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.quantize_rows.prefetch import FirstBytes, Prefetched
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import PART_ROWS, PARTS

# What memory delivers from the start of the quantizer to the first loads of the product, 3 us later.
PREFETCHED_BYTES = 12 * 2**20


def read_first(
    w: PreparedArray, tiling: FewTokensTiling | Tiling, nbytes: int | None = None, blocks: int = MULTIPROCESSORS
) -> Prefetched:
    """The words of the weights and the terms of their groups that all blocks together read first.

    They are the first stages of K of the parts that blocks read at the same time, of every part of K that blocks
    divide; or, if these are fewer bytes, further parts.

    Args:
      w: weights of the product, [k, n].
      tiling: of `prepared_few_tokens` or `gemm_expanded`.
      nbytes: to prefetch, about; None takes `PREFETCHED_BYTES`, 0 nothing.
      blocks: of the product.
    """
    nbytes = PREFETCHED_BYTES if nbytes is None else nbytes
    if not nbytes:
        return ()
    parts, stages = w.words.shape[0] * PARTS, w.words.shape[2]
    if isinstance(tiling, FewTokensTiling):
        at_once, splits = tiling.clusters(blocks) * tiling.parts, 1
    else:
        at_once, splits = math.ceil(blocks / tiling.splits) * tiling.block_n // PART_ROWS, tiling.splits
    arrays = [array for array in (w.words, w.terms) if array is not None]
    stage_bytes = [math.prod(array.shape[3:]) * array.dtype.itemsize for array in arrays]
    of_split = math.ceil(stages / splits)
    rows = min(parts, at_once)
    first = min(of_split, max(1, nbytes // (rows * splits * sum(stage_bytes))))
    if first == of_split:
        rows = max(rows, min(parts, nbytes // (stages * sum(stage_bytes))))
    ranges = sum(start + first <= stages for start in range(0, stages, of_split))
    return tuple(
        (array, FirstBytes(rows, stages * size, ranges, of_split * size, first * size))
        for array, size in zip(arrays, stage_bytes, strict=True)
    )
