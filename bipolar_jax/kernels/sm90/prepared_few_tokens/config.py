"""How the product of few tokens with prepared weights is divided: units of work, warps, slots of the ring buffer."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery
from bipolar_jax.kernels.sm90.core.cluster import clusters_at_once
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, OperandKind
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.prepared_weights.centred_floats import CentredExpansion
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion, unit_of_values
from bipolar_jax.packing.fields import CHUNK_WORDS, PART_ROWS, PARTS, STAGE, WORDS_PER_VECTOR
from bipolar_jax.packing.float_terms import BLOCK_TERMS, FloatTerms, terms_shape

MOST_TOKENS = 64
CHUNK = 8  # tokens: the columns of an instruction, and what is finished at once
RUN = PART_ROWS // 2  # columns of the output that follow each other, of either block of a part
FINISH_ROWS = 64  # of an array in the layout that the epilogue takes
PARTS_AT_ONCE = FINISH_ROWS // RUN
LATE_TERMS: tuple[FloatTerms, ...] = ("minimums", *BLOCK_TERMS)  # made by arithmetic, where they are multiplied
# Registers of the producer's threads, and of the consumers' by number of warpgroups. A block has as many as it starts
# with: 96 a thread with five warpgroups. Whoever asks for more waits for ever.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, {1: 232, 2: 232, 3: 160, 4: 112}


@dataclasses.dataclass(frozen=True)
class FewTokensTiling:
    """How a block divides its work.

    Attributes:
      warpgroups: that multiply, 1 to 4, beside the producer.
      parts: of the weights (`packing.fields`) that a block multiplies at a time, with the same tokens: a unit.
      depth: stages of K that a warp multiplies of each slot.
      slots: of the ring buffer.
      cluster: blocks that divide the K of a unit, 1, 2 or 4; each then finishes the sums of some of the tokens.
    """

    warpgroups: int
    parts: int = 1
    depth: int = 1
    slots: int = 4
    cluster: int = 1

    @property
    def warps(self) -> int:
        return WARPS * self.warpgroups

    @property
    def splits(self) -> int:
        """Warps that divide the stages of one part."""
        return self.warps // self.parts

    @property
    def workers(self) -> int:
        """Warps that multiply; warp s * parts + p has the stages s, s + splits ... of part p of a slot."""
        return self.splits * self.parts

    @property
    def stages(self) -> int:
        """Stages of K in a slot."""
        return self.splits * self.depth

    def token_rows(self, rows_of_stage: int = 1) -> int:
        """Rows of 128 bytes of a token in a slot: an odd number, so that a swizzle spreads those of eight tokens.

        Args:
          rows_of_stage: of a token: 1 of bytes, 2 of 16-bit floats.
        """
        return self.stages * rows_of_stage | 1

    def clusters(self, blocks: int) -> int:
        """Clusters that run at a time."""
        return max(1, min(blocks // self.cluster, clusters_at_once(self.cluster)))

    @property
    def buffers(self) -> int:
        """Chunks whose sums shared memory holds at a time; as many warpgroups finish chunks in turn."""
        return min(2, self.warpgroups)

    @property
    def rows(self) -> int:
        """Rows of either block of a unit, filled up to whole arrays of the epilogue."""
        return -(-self.parts // PARTS_AT_ONCE) * FINISH_ROWS


@dataclasses.dataclass(frozen=True)
class FloatTokens(FloatRecovery):
    """The `recovery` of float activations.

    Attributes:
      w_format: of the weights.
    """

    w_format: BipolarFormat

    @classmethod
    def of(cls, kind: OperandKind, k: int, w_format: BipolarFormat) -> FloatTokens:
        """Of sums in units of `FloatExpansion.unit`."""
        return cls(kind, k, w_format, unit=unit_of_values(FLOATS[kind]))

    def expansion(self, chunks: int, float_terms: FloatTerms | None) -> FloatExpansion:
        """How fields become floats, with so many chunks of a stage that have terms of their own, in this form."""
        if float_terms is None:
            return FloatExpansion(self.w_format, chunks, FLOATS[self.kind])
        return CentredExpansion(self.w_format, chunks, FLOATS[self.kind], float_terms)


@dataclasses.dataclass(frozen=True)
class FewTokensProblem:
    """One product, all static.

    Attributes:
      m: tokens.
      n: columns of the weights.
      recovery: how sums of bytes, or of floats, make the product of values.
      w_bits: of the codes of weights.
      chunks: chunks of a stage with terms of their own; 0 without groups.
      gated: whether the columns are gates and as many values.
      activation: applied before the cast, or None.
      dtype: of the output.
      tiling: of a block.
      float_terms: the form of float scales of groups; None if there are none.
    """

    m: int
    n: int
    recovery: ExpandedRecovery | FloatTokens
    w_bits: int
    chunks: int
    gated: bool
    activation: Activation | None
    dtype: jnp.dtype
    tiling: FewTokensTiling
    float_terms: FloatTerms | None = None

    @property
    def sums_dtype(self) -> jnp.dtype:
        """Of the sums that warps and blocks hand over."""
        return jnp.dtype(jnp.float32 if self.float_tokens or self.float_terms is not None else jnp.int32)

    @property
    def float_tokens(self) -> bool:
        """Whether activations are floats."""
        return isinstance(self.recovery, FloatTokens)

    @property
    def token_rows(self) -> int:
        """Rows of 128 bytes of a token in a slot."""
        return self.tiling.token_rows(self.rows_of_stage)

    @property
    def rows_of_stage(self) -> int:
        """Of a token."""
        return 2 if self.float_tokens else 1

    @property
    def terms_shape(self) -> tuple[int, int]:
        """Vectors of the terms of a stage and part, and words of each."""
        return terms_shape(self.float_terms, self.chunks)

    @property
    def term_words(self) -> int:
        """Words of the terms of a stage and part."""
        return math.prod(self.terms_shape)

    @property
    def half(self) -> int:
        """Columns of which a run begins: all, or the gates."""
        return self.n // 2 if self.gated else self.n

    @property
    def padded_half(self) -> int:
        """`half`, filled up to whole runs."""
        return -(-self.half // RUN) * RUN

    @property
    def halves(self) -> int:
        """Of the output."""
        return 2 if self.gated and self.activation is None else 1

    @property
    def units(self) -> int:
        return -(-num_parts(self.n, self.gated) // self.tiling.parts)

    @property
    def turns(self) -> int:
        """Slots of a unit."""
        return -(-self.recovery.k // (STAGE * self.tiling.stages))

    @property
    def token_chunks(self) -> int:
        return -(-self.m // CHUNK)

    @property
    def width(self) -> int:
        """Columns of the accumulators: the tokens, filled up to whole chunks."""
        return CHUNK * self.token_chunks

    @property
    def finished(self) -> list[tuple[int, int]]:
        """Arrays of FINISH_ROWS in a finished chunk: (group of rows, block); a gated activation joins the blocks."""
        joins = self.activation is not None and self.activation.gated
        groups = self.tiling.rows // FINISH_ROWS
        return [(group, block) for group in range(groups) for block in range(1 if joins else 2)]

    @property
    def adds_early(self) -> bool:
        """Whether the residual is loaded before a unit is multiplied: a warpgroup finishes one small chunk of it."""
        return self.tiling.cluster == 1 and self.token_chunks <= self.tiling.buffers and len(self.finished) <= 2

    @property
    def term_stages(self) -> int:
        return _term_stages(self.tiling, self.term_words)

    @property
    def shared_memory_bytes(self) -> int:
        slot = slot_bytes(self.tiling, self.m, self.w_bits, self.term_words, self.rows_of_stage)
        return self.tiling.slots * slot + other_bytes(self.tiling)

    def check(self) -> None:
        """Raises ValueError unless a block of this tiling fits the hardware."""
        tiling = self.tiling
        if not 1 <= self.m <= MOST_TOKENS:
            raise ValueError(f"from 1 to {MOST_TOKENS} tokens are multiplied, not {self.m}")
        if tiling.warpgroups not in CONSUMER_REGISTERS or not 1 <= tiling.parts <= tiling.warps or tiling.depth < 1:
            raise ValueError(f"1 to 4 warpgroups take a part a warp at most, and a stage at least: {tiling}")
        if tiling.cluster not in (1, 2, 4):
            raise ValueError(f"1, 2 or 4 blocks divide K: {tiling}")
        if tiling.slots < 2 or self.shared_memory_bytes > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"{tiling} takes {self.shared_memory_bytes} bytes of shared memory of {SHARED_MEMORY_BYTES} for "
                f"{self.m} tokens and weights of {self.w_bits} bits: use fewer slots or parts, and at least 2 slots"
            )

    def term_column(self, block: int, part):
        """The first of the columns of the weights that a block of a part holds; the part may be traced."""
        if self.gated:
            return part * RUN + block * self.half
        return part // PARTS * (PARTS * PART_ROWS) + part % PARTS * RUN + block * (PARTS * RUN)

    def first_in_half(self, block: int, part):
        """The first column within `half`: runs from `padded_half` on do not exist."""
        return part * RUN if self.gated else self.term_column(block, part)


def num_parts(n: int, gated: bool) -> int:
    """Parts of prepared weights of n columns."""
    tile = PARTS * RUN if gated else PARTS * PART_ROWS
    return PARTS * -(-(n // 2 if gated else n) // tile)


def _term_stages(tiling: FewTokensTiling, term_words: int) -> int:
    """Stages of terms in a slot: copies are whole multiples of 128 bytes, twice CHUNK_WORDS."""
    return tiling.stages + tiling.stages * tiling.parts * (term_words // CHUNK_WORDS) % 2


def slot_bytes(tiling: FewTokensTiling, m: int, w_bits: int, term_words: int, rows_of_stage: int = 1) -> int:
    """Of a slot: m tokens, weights, and the terms of their groups."""
    tokens = -(-m // CHUNK) * CHUNK * tiling.token_rows(rows_of_stage) * BYTES_PER_ROW
    weights = tiling.stages * tiling.parts * 4 * w_bits * WORDS_PER_VECTOR
    return tokens + weights + _term_stages(tiling, term_words) * tiling.parts * 4 * term_words


def other_bytes(tiling: FewTokensTiling) -> int:
    """Sums of warps, their totals, and the epilogue's terms."""
    sums = tiling.workers * PART_ROWS * CHUNK * 4
    totals, terms = 2 * tiling.rows * CHUNK * 4, 4 * 2 * tiling.rows * 4 + 3 * MOST_TOKENS * 4
    return tiling.buffers * (sums + totals + terms)
