"""The static side of a product of expanded weights: `gemm.problem.Problem` with weights as the rows of accumulators.

A `gemm.config.Tiling` is read so: tile_m tokens, up to 160 in the steps of an instruction's width, are the columns of a
consumer's accumulator, and tile_n columns of the output its rows, always TILE_ROWS. "split_n" gives the consumers of a
block the same tokens and weights of their own.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, is_legal_width
from bipolar_jax.kernels.sm90.gemm.config import CONSUMER_REGISTERS, CONSUMERS, PRODUCER_REGISTERS
from bipolar_jax.kernels.sm90.gemm.problem import Problem
from bipolar_jax.packing.fields import PARTS, STAGE, TILE_ROWS, WORDS_PER_VECTOR
from bipolar_jax.packing.float_terms import FloatTerms, term_words

CHUNK_TOKENS = CHUNK_COLUMNS = 64  # of output that leaves at once; the last chunk of a tile may have fewer tokens
_MOST_TOKENS = 160  # of a tile: a thread has as many accumulators, and of 176 ptxas serializes the products
# With float scales of groups a thread has, of 64 tokens, 32 sums of a chunk, twice, and 64 of all. Of 128 it has 64 and
# 128, with more registers, and where a stage is one chunk.
_SCALED_TOKENS, _MOST_SCALED_TOKENS = 64, 128
_MOST_TMA_ROWS = 256
_TERMS_UNIT = 32  # terms of 4 bytes


@dataclasses.dataclass(frozen=True)
class ExpandedProblem(Problem):
    """One product, as all warpgroups of its kernel see it.

    Attributes:
      w_bits: of the codes of weights.
      chunks: chunks of a stage with terms of their own, see `packing.fields`; 0 without groups.
      lag: stages by which the second consumer of a block's tile stays behind the first, so that the products of one run
        under the epilogue of the other.
      float_terms: the form of float scales of groups, or None; see `scaled_multiply`, and `floats`.
    """

    w_bits: int = 4
    chunks: int = 0
    lag: int = 0
    float_terms: FloatTerms | None = None

    token_axis: ClassVar[Literal[0, 1]] = 1

    @property
    def is_float(self) -> bool:
        """Whether tokens are 16-bit floats, and weights become such."""
        return isinstance(self.recovery, FloatRecovery)

    @property
    def scales_sums(self) -> bool:
        """Whether sums of chunks are scaled, and not weights."""
        return self.float_terms is not None and not self.is_float

    @property
    def token_tiles(self) -> int:
        """Tiles of tokens in a stage, with rows of 128 bytes: parts of the stage along K."""
        return 2 if self.is_float else 1

    @property
    def steps_over_k(self) -> int:
        """Stages of a pass over a split of K."""
        return -(-self.recovery.k // (STAGE * self.splits))

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of the producer, and of a consumer: 512 for one and both together."""
        if self.scales_sums and self.tiling.tile_m > _SCALED_TOKENS:
            return 24, 240
        return PRODUCER_REGISTERS, CONSUMER_REGISTERS

    @property
    def stages_of_lag(self) -> int:
        """`lag`, or as much of it as there can be."""
        return min(self.lag, self.steps_over_k) if self.tiling.consumers_per_tile == CONSUMERS else 0

    @property
    def weight_tiles(self) -> int:
        """Tiles of weights in a stage of the ring buffer."""
        return self.tiling.block_n // TILE_ROWS

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage of the ring buffer."""
        weights = 4 * PARTS * (self.w_bits * WORDS_PER_VECTOR + term_words(self.float_terms, self.chunks))
        token_sums = 4 * self.chunks if self.scales_sums else 0
        return self.tiling.block_m * (self.token_tiles * BYTES_PER_ROW + token_sums) + self.weight_tiles * weights

    @property
    def token_terms(self) -> int:
        """Numbers of a vector over a block's tokens in shared memory: TMA writes to multiples of 128 bytes."""
        return -(-self.tiling.block_m // _TERMS_UNIT) * _TERMS_UNIT

    @property
    def _shares_one_chunk(self) -> bool:
        """Whether consumers share tokens, and scale a stage once."""
        return self.tiling.schedule == "split_n" and self.chunks == 1

    def staging_slots(self, itemsize: int) -> int:
        """Chunks of output that each consumer can have on their way to memory: a tile's, or as many as fit."""
        chunks = -(-self.tiling.tile_m // CHUNK_TOKENS) * (self.out_tile_n // CHUNK_COLUMNS)
        fits = (self.shared_memory_bytes(itemsize, n) <= SHARED_MEMORY_BYTES for n in range(1, chunks + 1))
        return max(1, sum(fits))

    def shared_memory_bytes(self, itemsize: int, staging_slots: int = 1) -> int:
        """Bytes of shared memory of one block, for an output of `itemsize` bytes a number."""
        tiling = self.tiling
        staging = CONSUMERS * staging_slots * CHUNK_TOKENS * CHUNK_COLUMNS * itemsize
        # At most three vectors over the tokens of a tile, and four over its columns.
        terms = tiling.tiles_in_progress * (3 * self.token_terms + 4 * tiling.block_n) * 4
        return tiling.slots * self.stage_bytes + staging + terms

    def check(self, itemsize: int) -> None:
        """Raises ValueError unless a block of this shape fits the hardware, for an output of `itemsize` bytes."""
        tiling = self.tiling
        if tiling.tile_n != TILE_ROWS:
            raise ValueError(f"tile_n must be {TILE_ROWS}, the rows of a tile of prepared weights, got {tiling}")
        if tiling.tile_m > _MOST_TOKENS or not is_legal_width(tiling.tile_m, is_float=self.is_float):
            step = 8 if self.is_float else 16
            raise ValueError(
                f"tile_m must be at most {_MOST_TOKENS}, a multiple of {step} (of 8 up to 32), got {tiling}"
            )
        if self.scales_sums and (
            tiling.splits > 1
            or self.chunks not in (1, 2, 4)
            or tiling.tile_m % CHUNK_TOKENS
            or tiling.block_m > (_MOST_SCALED_TOKENS if self._shares_one_chunk else _SCALED_TOKENS)
        ):
            raise ValueError(
                f"with float scales of groups a block has tiles of {_SCALED_TOKENS} tokens, no splits of K and 1, 2 or "
                f"4 chunks a stage; of {_MOST_SCALED_TOKENS} tokens with one chunk and split_n, got {tiling} and "
                f"{self.chunks} chunks"
            )
        if max(tiling.block_m, tiling.block_n) > _MOST_TMA_ROWS or {tiling.cluster_m, tiling.cluster_n} - {1, 2}:
            raise ValueError(f"TMA loads at most {_MOST_TMA_ROWS} rows, for clusters of 1 or 2 along an axis: {tiling}")
        if self.lag >= tiling.slots:
            # The first consumer would wait for stages that the second has not read.
            raise ValueError(f"a lag of {self.lag} stages needs more than {tiling.slots} slots")
        needed = self.shared_memory_bytes(itemsize)
        if tiling.slots < 2 or needed > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"{tiling} takes {needed} bytes of shared memory of {SHARED_MEMORY_BYTES} with weights of "
                f"{self.w_bits} bits: use fewer slots or smaller tiles, and at least 2 slots"
            )
