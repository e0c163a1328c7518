"""The tiling of a product of few tokens with prepared weights, by what its busiest block reads."""

from __future__ import annotations

import dataclasses

from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import (
    CHUNK,
    FewTokensTiling,
    num_parts,
    other_bytes,
    slot_bytes,
)
from bipolar_jax.packing.fields import PART_ROWS, STAGE, WORDS_PER_VECTOR
from bipolar_jax.packing.float_terms import FloatTerms, term_words

_MOST_PARTS, _MOST_DEPTH, _MOST_SLOTS = 8, 4, 8
_SLOT_BYTES = 16 * 1024  # of weights: fewer are not worth the barriers
# Of weights. Slots of 32 KB of 4-bit weights are read at 4 TB/s. Of 8 bits twelve warps had three slots of 48 KB, of
# which the last of a K of 4096 was a third empty: an H200 took twice as long as memory does.
_MOST_SLOT_BYTES = 45 * 1024
# Bytes a cycle that one of 132 multiprocessors gets from memory, and in all.
_FROM_MEMORY, _ARRIVING = 18, 26
# Products of bytes that the tensor cores of a multiprocessor make in a cycle of `mma.sync`, half of what wgmma makes.
_PRODUCTS_OF_BYTES = 2048
# Cycles, about, until the blocks of a cluster have each other's sums. Of floats a pair takes as long in every round,
# four blocks twice as long: 16 x 4096 x 14336 at W4A16g128 took 18.6 us with four, 15.4 with two, 15.1 with one. Of
# codes a further round takes half as long: 4 x 18944 x 28672, of 9 rounds in pairs, took 87 and 80 us with and without
# at W4A8, 66 and 59 at W2A8g64 (`bench_coverage_seed_1.json` of an H200).
_EXCHANGE = 5000
# Of the cycles, what clusters must save: all multiprocessors together get less from memory than the model gives them,
# where they read for long (272 MB in 77 us without the launch, `bench_coverage_seed_1.json`; 59 MB in 15,
# `bench_prepared_few_tokens.json`).
_LEAST_SAVING = 0.03
# Microseconds of an H200 around the reading, and of each chunk that a warpgroup finishes after its first: with them the
# model has 18, 14, 7.7, 6.2 us for 16 tokens of Llama-3-8B's products, which took 19.8, 11.4, 7.2 and 6.0, and 31 and
# 28 for 64 tokens of the largest two, which took 29.3 and 30.0 (W4A8g128, `few_tokens.py`).
_LAUNCH, _CHUNK, _CYCLES_PER_MICROSECOND = 3.3, 1.9, 1755


def few_tokens_tiling(
    m: int,
    n: int,
    k: int,
    w_bits: int,
    chunks: int,
    gated: bool = False,
    blocks: int = MULTIPROCESSORS,
    *,
    float_terms: FloatTerms | None = None,
    rows_of_stage: int = 1,
) -> FewTokensTiling:
    """The tiling with the least time to read what the busiest block reads; of several the one with the fewest parts.

    Args:
      m, n, k: tokens, columns of the weights, contracted size.
      w_bits: of the weights.
      chunks: chunks of a stage with terms of their own; 0 without groups.
      gated: whether the columns are gates and as many values.
      blocks: thread blocks.
      float_terms: the form of float scales of groups; None if there are none.
      rows_of_stage: rows of 128 bytes of a token in a stage.
    """
    total, stages, part = num_parts(n, gated), -(-k // STAGE), part_bytes(w_bits, term_words(float_terms, chunks))
    most_warpgroups = 4 if m <= 2 * CHUNK else 3  # more accumulators need more registers
    fields = part_bytes(w_bits, 0)

    def cycles(tiling: FewTokensTiling) -> float:
        margin = 1 if tiling.cluster == 1 else 1 + _LEAST_SAVING
        return margin * reading_cycles(tiling, m, rows_of_stage, total, stages, part, blocks)

    def depth_of(tiling: FewTokensTiling) -> int:
        wanted = -(-_SLOT_BYTES // (tiling.workers * part))
        return max(1, min(wanted, _MOST_DEPTH, stages // (tiling.cluster * tiling.splits)))

    shares = [
        FewTokensTiling(most_warpgroups, parts, cluster=cluster)
        for cluster in (1, 2, 4)
        for parts in range(1, min(_MOST_PARTS, total) + 1)
        if cluster <= blocks
    ]
    for least_slots in (3, 2):
        for share in sorted(shares, key=cycles):
            by_warpgroups = [dataclasses.replace(share, warpgroups=w) for w in range(1, most_warpgroups + 1)]
            small = [tiling for tiling in by_warpgroups if tiling.workers * fields <= _MOST_SLOT_BYTES]
            # The most warps that have work.
            for tiling in sorted(small, key=lambda tiling: -tiling.workers):
                for depth in range(depth_of(tiling) if tiling.workers else 0, 0, -1):
                    tiling_of_depth = dataclasses.replace(tiling, depth=depth)
                    fitted = with_slots(tiling_of_depth, m, w_bits, chunks, float_terms, rows_of_stage)
                    if fitted.slots >= least_slots:
                        return fitted
    raise AssertionError(f"no tiling fits {m} tokens and weights of {w_bits} bits")


def few_tokens_microseconds(
    tiling: FewTokensTiling,
    m: int,
    n: int,
    k: int,
    w_bits: int,
    chunks: int,
    gated: bool = False,
    *,
    rows_of_stage: int = 1,
) -> float:
    """The modelled time on all multiprocessors without float groups; arguments as of `few_tokens_tiling`."""
    total, stages = num_parts(n, gated), -(-k // STAGE)
    part = part_bytes(w_bits, term_words(None, chunks))
    rounds = -(-total // (tiling.parts * tiling.clusters(MULTIPROCESSORS)))
    finished = rounds * max(0, -(-m // CHUNK) - tiling.buffers)
    reading = reading_cycles(tiling, m, rows_of_stage, total, stages, part, MULTIPROCESSORS)
    products = rounds * stages * tiling.parts * PART_ROWS * STAGE * (-(-m // CHUNK) * CHUNK) / tiling.cluster
    busiest = max(reading, products * rows_of_stage / _PRODUCTS_OF_BYTES)
    return _LAUNCH + busiest / _CYCLES_PER_MICROSECOND + _CHUNK * finished


def reading_cycles(
    tiling: FewTokensTiling, m: int, rows_of_stage: int, parts: int, stages: int, part_bytes: int, blocks: int
) -> float:
    """Cycles that the busiest block takes to read tokens and some of the parts in each of the stages, and to exchange.

    Args:
      tiling: of the product.
      m: tokens.
      rows_of_stage: rows of 128 bytes of a token in a stage: two of floats, one of codes.
      parts, stages: of the weights.
      part_bytes: of a part in a stage.
      blocks: thread blocks.
    """
    rounds = -(-parts // (tiling.parts * tiling.clusters(blocks)))
    arriving = tiling.parts * part_bytes + m * rows_of_stage * BYTES_PER_ROW
    stage = max(tiling.parts * part_bytes / _FROM_MEMORY, arriving / _ARRIVING)
    reading = rounds * stages * stage / tiling.cluster
    if tiling.cluster == 1:
        return reading
    exchanges = rounds * tiling.cluster / 2 if rows_of_stage > 1 else (1 + rounds) / 2
    return reading + exchanges * _EXCHANGE


def with_slots(
    tiling: FewTokensTiling,
    m: int,
    w_bits: int,
    chunks: int,
    float_terms: FloatTerms | None = None,
    rows_of_stage: int = 1,
) -> FewTokensTiling:
    """The tiling with as many slots as fit shared memory and are of use; arguments as of `few_tokens_tiling`."""
    free = SHARED_MEMORY_BYTES - other_bytes(tiling)
    slot = slot_bytes(tiling, m, w_bits, term_words(float_terms, chunks), rows_of_stage)
    return dataclasses.replace(tiling, slots=min(_MOST_SLOTS, free // slot))


def part_bytes(w_bits: int, term_words: int) -> int:
    """Of one part and stage, whose terms have so many words."""
    return 4 * (w_bits * WORDS_PER_VECTOR + term_words)
