"""How decode attention is divided among blocks and threads, and its ring buffers in shared memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.cluster import clusters_at_once
from bipolar_jax.kernels.sm90.core.fragments import WARPS, canonical_layout
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, TMA_ALIGNMENT
from bipolar_jax.kernels.unsupported import Unsupported

ROWS = 16  # positions in a fragment of a warpgroup: 4 a warp, 8 threads each
_THREADS_PER_ROW = 8
_MOST_NUMBERS = 512  # in a block's queries together: with their sums they fill half of the registers
_RING_BYTES = 96 * 1024  # ring buffers of keys and values: two blocks fit a multiprocessor
_TILE_BYTES = 16 * 1024  # of keys in a tile, about
_MOST_POSITIONS, _MOST_SLOTS = 64, 8
_MOST_BLOCKS = 8  # in a portable cluster
_BLOCKS_AT_ONCE = 2 * MULTIPROCESSORS  # of one warpgroup
_SEQUENCES = (1, 2, 4, 8)  # of a block
# Tiles on the tensor cores.
TILE_QUERIES = 8  # rows of an instruction that are used
WARP_POSITIONS = 16
TILE_ROWS, TILE_COLUMNS = 8, 64  # of the blocks of a tile that a 128-byte swizzle permutes
_TENSOR_CORE_HEADS = (64, 128)
_WARPGROUPS = 2  # of a block that has a multiprocessor for itself
_FEWEST_BLOCKS = MULTIPROCESSORS * 3 // 4  # that are worth a multiprocessor each
MASKED_SCORE = -1e30  # finite, so that the difference of two is a number
START_SCORE = -5e29  # the largest score of no positions: 2^(MASKED_SCORE - START_SCORE) is 0
TERMS = 2  # of a total, besides the values: the largest score and the sum of weights


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """A block takes some queries of a key head, and every `splits`-th tile of the sequence's positions.

    Warpgroups of a block divide its positions further. Each has a ring buffer of its own.

    Attributes:
      batch, heads, kv_heads, capacity, head_dim: of the model and its cache.
      bits: of the cache's codes, 8 or 4, or None for floats.
      itemsize: bytes of an element of the cache.
      splits: blocks that divide the positions of a sequence.
      sequences: that a block takes one after the other; more than one only where a block takes a whole key head.
      warpgroups: of a block, 1 or, on tensor cores, 2.
    """

    batch: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
    bits: int | None
    itemsize: int
    splits: int
    sequences: int = 1
    warpgroups: int = 1

    @property
    def parts(self) -> int:
        """Warpgroups that divide the positions of a sequence."""
        return self.splits * self.warpgroups

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.kv_heads

    @property
    def members(self) -> int:
        """Blocks that divide the queries of a key head; they read the same keys at the same time."""
        return -(-self.group * self.head_dim // _MOST_NUMBERS)

    @property
    def cluster(self) -> int:
        """Blocks for a key head of one sequence."""
        return self.members * self.splits

    @property
    def queries(self) -> int:
        """Queries of a block; the last member's may be beyond the group."""
        return -(-self.group // self.members)

    @property
    def half(self) -> int:
        """Elements of half a vector. A rotary pair, and the two codes of a byte, are one element of each half."""
        return self.head_dim // 2

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector in the cache, without its scale and zero code."""
        return (self.half if self.bits == 4 else self.head_dim) * self.itemsize

    @property
    def positions(self) -> int:
        """Positions in a tile, which is loaded at once."""
        positions = ROWS
        while 2 * positions <= min(_MOST_POSITIONS, _TILE_BYTES // self.row_bytes):
            positions *= 2
        return positions

    @property
    def slots(self) -> int:
        """Stages of a warpgroup's ring buffer of keys, and of that of values; each holds a tile."""
        return max(2, min(_MOST_SLOTS, _RING_BYTES // (2 * self.positions * self.row_bytes)))

    @property
    def on_tensor_cores(self) -> bool:
        """Whether scores and sums of values are products of tiles (`tiles.py`): of 16-bit floats."""
        fits = self.head_dim in _TENSOR_CORE_HEADS and self.queries <= TILE_QUERIES
        return fits and self.bits is None and self.itemsize == 2 and self.positions == WARPS * WARP_POSITIONS

    @property
    def staged_bytes(self) -> int:
        """Bytes from one vector of the new token to the next in shared memory, on tensor cores (`new_token.py`)."""
        return self.row_bytes + 16

    @property
    def totals(self) -> int:
        """Totals of a query in a block: of each warp, and on tensor cores of the new token."""
        return self.warpgroups * WARPS + self.on_tensor_cores

    @property
    def score_unit(self) -> float:
        """What scores are multiplied with, as exponents of 2."""
        return math.log2(math.e) / math.sqrt(self.head_dim)

    @property
    def layout(self) -> Any:
        """Layout of fragments [ROWS, half]: 8 threads a row, with vectors as long as one load."""
        return rows_layout(self.half, self._longest)

    @property
    def _longest(self) -> int:
        return 8 if self.itemsize < 4 else 4

    @property
    def layout_vector(self) -> int:
        """Neighbouring elements of `layout` in a thread."""
        return row_vector(self.half, self._longest)


def rows_layout(columns: int, longest: int) -> Any:
    """Layout of fragments [ROWS, columns], with vectors of up to `longest` elements.

    Raises:
      Unsupported: columns that 8 threads cannot share.
    """
    if columns % _THREADS_PER_ROW:
        raise Unsupported(f"head_dim must be a multiple of {2 * _THREADS_PER_ROW}, not {2 * columns}")
    vector = row_vector(columns, longest)
    width = _THREADS_PER_ROW * vector
    return canonical_layout(
        plgpu.Tiling(((ROWS, width), (ROWS // 4, width), (1, vector))),
        warp_dims=(-6,),
        lane_dims=(-4, -3),
        vector_dim=-1,
    )


def row_vector(columns: int, longest: int) -> int:
    """Neighbouring elements that a thread has of a row of `rows_layout`."""
    vector = longest
    while columns % (_THREADS_PER_ROW * vector):
        vector //= 2
    return vector


def plan_attention(
    batch: int,
    heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: jnp.dtype,
    bits: int | None,
    splits: int | None = None,
    sequences: int | None = None,
    warpgroups: int | None = None,
) -> AttentionPlan:
    """The plan for one token of each sequence.

    Args:
      batch, heads, kv_heads, capacity, head_dim: of the model and its cache.
      dtype: of the cache's elements.
      bits: of the cache's codes, 8 or 4, or None for floats.
      splits: blocks that divide a sequence's positions, 1, 2, 4 or 8; None chooses.
      sequences: of a block; None chooses.
      warpgroups: of a block, 1 or 2; None chooses.

    Raises:
      ValueError: sequences that do not divide the batch, or several where blocks share a key head; two warpgroups where
        tensor cores do not serve.
      Unsupported: head_dim is not a multiple of 16 (with 4 bits, of 32), or above 256; capacity is not a multiple of
        64; a key head has more queries than 8 blocks can take.
    """
    if head_dim % (2 * _THREADS_PER_ROW) or head_dim > 256:
        raise Unsupported(
            f"head_dim must be a multiple of {2 * _THREADS_PER_ROW} up to 256, not {head_dim}: XLA serves others"
        )
    if capacity % _MOST_POSITIONS:
        raise Unsupported(f"capacity must be a multiple of {_MOST_POSITIONS}, not {capacity}: XLA serves others")
    plan = AttentionPlan(batch, heads, kv_heads, capacity, head_dim, bits, jnp.dtype(dtype).itemsize, 1)
    if plan.row_bytes % TMA_ALIGNMENT:
        raise Unsupported(
            f"a vector in the cache must have a multiple of {TMA_ALIGNMENT} bytes, not {plan.row_bytes}: "
            "XLA serves others"
        )
    if plan.members > _MOST_BLOCKS:
        raise Unsupported(f"{plan.group} queries of {head_dim=} that share a key head: XLA serves them")
    return _divided(plan, splits, sequences, warpgroups)


def _divided(plan: AttentionPlan, splits: int | None, sequences: int | None, warpgroups: int | None) -> AttentionPlan:
    """The plan with what is None chosen; raises ValueError as `plan_attention` says."""
    if warpgroups is None:
        warpgroups = _warpgroups(plan)
    elif warpgroups > 1 and not plan.on_tensor_cores:
        raise ValueError(f"{warpgroups} warpgroups share a block on tensor cores only, which do not serve {plan}")
    at_once = _BLOCKS_AT_ONCE // warpgroups
    if splits is None:
        # As many blocks as run at the same time, and at most one for each tile.
        splits = 1
        while (
            2 * splits * plan.members <= _MOST_BLOCKS
            and plan.batch * plan.kv_heads <= clusters_at_once(2 * splits * plan.members, at_once // MULTIPROCESSORS)
            and 2 * splits * warpgroups * plan.positions <= plan.capacity
        ):
            splits *= 2
    if sequences is None:
        sequences = (_fitting_sequences(plan, at_once) or 1) if splits * plan.members == 1 else 1
    elif plan.batch % sequences or (sequences > 1 and splits * plan.members > 1):
        raise ValueError(
            f"a block takes {sequences} sequences of {plan.batch} in turn: they must divide the batch, and blocks must "
            f"take whole key heads, not {splits} splits of {plan.members} blocks"
        )
    return dataclasses.replace(plan, splits=splits, sequences=sequences, warpgroups=warpgroups)


def _warpgroups(plan: AttentionPlan) -> int:
    """Two where blocks that have a multiprocessor each, in clusters of two at most, run at once and fill the chip."""
    blocks = plan.batch * plan.kv_heads * plan.members
    if not plan.on_tensor_cores or 2 * blocks < _FEWEST_BLOCKS:
        return 1
    if blocks > MULTIPROCESSORS:
        sequences = _fitting_sequences(plan, MULTIPROCESSORS) if plan.members == 1 else None
        if sequences is None or blocks // sequences < _FEWEST_BLOCKS:
            return 1
    return _WARPGROUPS


def _fitting_sequences(plan: AttentionPlan, at_once: int) -> int | None:
    """The fewest sequences of a block with which all blocks run at once."""
    fit = (s for s in _SEQUENCES if plan.batch % s == 0 and plan.batch // s * plan.kv_heads <= at_once)
    return next(fit, None)
