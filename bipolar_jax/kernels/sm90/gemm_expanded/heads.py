"""Queries, keys and values of prompts, from accumulators whose columns are tokens.

As `gemm.outputs.heads`, whose writer does most of the work. A tile has 128 columns of the output: a head of 128
numbers, or two of 64.

- The halves of a head of 128 are the two blocks of 64 rows of an accumulator: a thread has both numbers of each pair.
  It rotates them in registers, by cosines and sines that it reads transposed, and 16-bit numbers are transposed on
  their way to staging slots.
- The halves of a head of 64 are in the registers of different warps. The head is transposed first: as float32 numbers,
  through a buffer of its own. Tokens are then rows, as in `gemm.outputs.heads`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.arithmetic.epilogue import staging_transforms
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR
from bipolar_jax.kernels.sm90.gemm.config import CONSUMERS, Tiling
from bipolar_jax.kernels.sm90.gemm.outputs.head_layout import HeadLayout
from bipolar_jax.kernels.sm90.gemm.outputs.heads import HeadOutput, HeadWriter
from bipolar_jax.kernels.sm90.gemm.outputs.protocol import Finish
from bipolar_jax.kernels.sm90.gemm_expanded.head_norms import SUMS_SHAPE, normalize_heads
from bipolar_jax.kernels.sm90.gemm_expanded.problem import CHUNK_COLUMNS, CHUNK_TOKENS, ExpandedProblem

# Float32 numbers between rows of the buffer, so that threads that write a column of it meet different banks.
_PADDING = 4
_EXCHANGE = (CONSUMERS, CHUNK_TOKENS, CHUNK_COLUMNS + _PADDING)


def shared_memory_bytes(problem: ExpandedProblem, layout: HeadLayout) -> int:
    """Bytes of shared memory of one block whose output is heads: all chunks of a tile have a staging slot."""
    chunks = problem.tiling.tile_m * problem.tiling.tile_n // (CHUNK_TOKENS * CHUNK_COLUMNS)
    exchange = 4 * CONSUMERS * CHUNK_TOKENS * (CHUNK_COLUMNS + _PADDING) if _exchanges(layout) else 0
    norms = 0 if layout.norm_eps is None else 4 * CONSUMERS * math.prod(SUMS_SHAPE)
    return problem.shared_memory_bytes(itemsize=2, staging_slots=chunks) + exchange + norms


def with_room_for_heads(problem: ExpandedProblem, layout: HeadLayout) -> Tiling:
    """The problem's tiling with as many slots as heads leave room for, at most those that it has."""
    while problem.tiling.slots > 2 and shared_memory_bytes(problem, layout) > SHARED_MEMORY_BYTES:
        fewer = dataclasses.replace(problem.tiling, slots=problem.tiling.slots - 1)
        problem = dataclasses.replace(problem, tiling=fewer)
    return problem.tiling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedHeadOutput(HeadOutput):
    """`HeadOutput` for accumulators whose columns are tokens; heads of 64 or 128 numbers."""

    token_axis: ClassVar[int] = 1

    def scratch(self, problem: ExpandedProblem, staging_slots: int) -> dict[str, Any]:
        """A staging slot for every chunk, as `HeadOutput` has, and the buffer that heads of 64 are transposed in."""
        del staging_slots  # of float32 numbers; heads are staged in 16 bits
        layout, tiling, dtype = self.layout, problem.tiling, self.keys.dtype
        if tiling.tile_m % CHUNK_TOKENS:
            raise ValueError(f"heads take tiles of a multiple of {CHUNK_TOKENS} tokens, got {tiling}")
        if (needed := shared_memory_bytes(problem, layout)) > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"{tiling} takes {needed} bytes of shared memory of {SHARED_MEMORY_BYTES} with heads of {layout.size}: "
                "use fewer slots"
            )
        slots = layout.chunks(tiling.tile_m, tiling.tile_n)
        transforms = staging_transforms(layout.half, dtype)
        shared = {
            "staging": plgpu.SMEM((CONSUMERS, slots, CHUNK_TOKENS, layout.half), dtype, transforms=transforms),
            "exchanged_head": plgpu.SMEM(_EXCHANGE, jnp.float32) if _exchanges(layout) else None,
            "head_norms": None if self.gains is None else plgpu.SMEM((CONSUMERS, *SUMS_SHAPE), jnp.float32),
            "arrived": None if self.tables is None else plgpu.Barrier(num_barriers=CONSUMERS * slots),
        }
        return {name: specification for name, specification in shared.items() if specification is not None}

    def writer(self, problem: ExpandedProblem, targets, scratch: dict[str, Any], consumer) -> HeadWriter:
        staging, arrived = scratch["staging"].at[consumer], scratch.get("arrived")
        operands = (problem, self, *targets, self.layer[0], staging, arrived, consumer)
        if _exchanges(self.layout):
            return ExchangedHeadWriter(*operands, scratch["exchanged_head"].at[consumer])
        norms = None if self.gains is None else scratch["head_norms"].at[consumer]
        return TransposedHeadWriter(*operands, norms)


@dataclasses.dataclass(frozen=True)
class TransposedHeadWriter(HeadWriter):
    """`HeadWriter` of heads of 128: halves are [64 numbers, 64 tokens] in registers.

    Attributes:
      norms: `head_norms.SUMS_SHAPE` in shared memory, or None if heads are not normalized.
    """

    norms: Any = None
    token_axis: ClassVar[int] = 1
    finish_shape = (CHUNK_COLUMNS, CHUNK_TOKENS)

    def _halves(self, finished: Finish, row: int, first: int) -> list[Float[Array, "64 64"]]:
        return [finished(first, row), finished(first + self.layout.half, row)]

    def _normalized(self, halves: list[Float[Array, "64 64"]], head) -> list[Float[Array, "64 64"]]:
        if self.output.gains is None:
            return halves
        is_key = head >= self.layout.queries
        return normalize_heads(halves, self.output.gains, is_key, self.layout.norm_eps, self.norms)

    def _read(self, slot: int) -> Float[Array, "64 64"]:
        return plgpu.load(self._transposed(slot), layout=plgpu.Layout.WGMMA, optimized=False)

    def _write(self, slot: int, half: Float[Array, "64 64"]) -> None:
        self._transposed(slot)[...] = half

    def _transposed(self, slot: int):
        """A slot has tokens as rows, the accumulator as columns."""
        return self.staging.at[slot].transpose((1, 0))


@dataclasses.dataclass(frozen=True)
class ExchangedHeadWriter(HeadWriter):
    """`HeadWriter` of heads of 64: their halves are [64 tokens, 32 numbers], after the warps have exchanged numbers.

    Attributes:
      exchange: float32 [64 tokens, 64 numbers and padding] in shared memory.
    """

    exchange: Any
    finish_shape = (CHUNK_COLUMNS, CHUNK_TOKENS)

    def _halves(self, finished: Finish, row: int, first: int) -> list[Float[Array, "64 32"]]:
        head = self.exchange.at[:, pl.ds(0, self.layout.size)]
        # All threads have read the head before: they have met since, at the barrier behind its staging slots.
        head.transpose((1, 0))[...] = plgpu.layout_cast(finished(first, row), ACCUMULATOR)
        plgpu.commit_smem()
        halves = [self.exchange.at[:, pl.ds(half * self.layout.half, self.layout.half)] for half in (0, 1)]
        return [plgpu.load(half, layout=plgpu.Layout.WGMMA, optimized=False) for half in halves]


def _exchanges(layout: HeadLayout) -> bool:
    """Whether the halves of a head are in the registers of different warps."""
    return layout.half < CHUNK_COLUMNS
