"""How the product of few tokens is divided: columns of the accumulator, warpgroups, ring buffers."""

from __future__ import annotations

import dataclasses
import itertools

from bipolar_jax.kernels.sm90.arithmetic.group_sizes import FEW_TOKENS_GROUP_SIZES
from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.hardware import SHARED_MEMORY_BYTES
from bipolar_jax.kernels.sm90.core.wgmma import BYTES_PER_ROW, K_SLICE, ROWS_PER_INSTRUCTION
from bipolar_jax.kernels.sm90.gemm_few_tokens.groups import groups_per_instruction
from bipolar_jax.kernels.unsupported import Unsupported

TOKENS_PER_BLOCK = 8  # columns of one plane come in multiples of this, the narrowest instruction
MOST_COLUMNS = 256  # of an instruction
_MOST_WARPGROUPS, _LEAST_SLOTS, _MOST_SLOTS = 4, 3, 8
_TERMS_BYTES = 4 * 1024  # shared memory for the epilogue's vectors and barriers


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
    """How a block divides K among warpgroups.

    Attributes:
      warpgroups: 1 to 4; they take slices of 1024 elements of K in turn.
      w_slots: stages of each warpgroup's ring buffer of weights: tiles of one plane, 64 x 1024 bits.
      x_slots: stages of its ring buffer of tokens: tiles of all planes of the tokens, 1024 bits wide.
      parts: the tokens are cut into this many parts, each multiplied by itself. The name is that of tuning tables.
    """

    warpgroups: int
    w_slots: int
    x_slots: int
    parts: int = 1

    def part_tokens(self, m: int) -> int:
        """Of m tokens, those that are multiplied together."""
        return -(-m // self.parts)


def token_columns(m: int) -> int:
    """Columns of the accumulator for m tokens of one plane."""
    return -(-m // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK


def x_planes(m: int, a_bits: int, group_size: int | None = None) -> int:
    """Activation planes, plus one ignored plane when their columns are not a legal wgmma width."""
    planes = groups_per_instruction(group_size) * a_bits
    return planes if wgmma.is_legal_width(planes * token_columns(m)) else planes + 1


def decode_tiling(m: int, k: int, a_bits: int, w_bits: int = 1, group_size: int | None = None) -> DecodeTiling:
    """The first of `decode_tilings`."""
    return decode_tilings(m, k, a_bits, w_bits, group_size)[0]


def decode_tilings(
    m: int, k: int, a_bits: int, w_bits: int = 1, group_size: int | None = None
) -> tuple[DecodeTiling, ...]:
    """All tilings that fit, with ring buffers as deep as fit; those with more warpgroups first.

    Last come those whose warpgroups have a single step, one plane of one slice: adding up their sums takes longer than
    it saves. Of 16 x 4096 x 4096 at W1A1 two warpgroups were 11% faster than four
    (`bench_coverage_plans.json` of an H200).

    Args:
      m, k: tokens, and contracted size.
      a_bits: bits of the activations.
      w_bits: bits of the weights; with groups all planes of a slice are in the ring at once.
      group_size: elements of K that share a scale, or None.

    Raises:
      Unsupported: more columns than an instruction has, or groups of another size.
    """
    if group_size is not None and group_size not in FEW_TOKENS_GROUP_SIZES:
        raise Unsupported(f"groups of few tokens must have {FEW_TOKENS_GROUP_SIZES} elements, not {group_size}")
    columns = accumulator_columns(m, a_bits, group_size)
    if columns > MOST_COLUMNS:
        raise Unsupported(f"{m} tokens of {a_bits} planes are {columns} columns, more than {MOST_COLUMNS}")
    least_slots = _LEAST_SLOTS if group_size is None else max(_LEAST_SLOTS, w_bits)
    # 512 threads have 128 registers each: too few for the widest accumulator.
    most = _MOST_WARPGROUPS if columns <= MOST_COLUMNS // (2 if group_size is None else 4) else 2
    tilings = []
    for warpgroups, x_slots in itertools.product(range(min(most, -(-k // K_SLICE)), 0, -1), (2, 1)):
        partial_sums = 4 * ROWS_PER_INSTRUCTION * token_columns(m) * warpgroups  # and the output
        left = (SHARED_MEMORY_BYTES - _TERMS_BYTES - partial_sums) // (warpgroups * BYTES_PER_ROW)  # rows of tiles
        w_slots = min(_MOST_SLOTS, (left - x_slots * columns) // ROWS_PER_INSTRUCTION)
        if w_slots >= least_slots:
            tilings.append(DecodeTiling(warpgroups, w_slots, x_slots))
    steps = -(-k // K_SLICE) * w_bits
    tilings.sort(key=lambda tiling: tiling.warpgroups > max(1, steps // 2))
    return tuple(tilings)  # not empty: one warpgroup with one slot of tokens always fits


def parted_tiling(m: int, k: int, a_bits: int, w_bits: int) -> DecodeTiling:
    """`decode_tiling` with the fewest parts of the tokens whose columns fit an instruction."""
    parts = next(n for n in range(1, m + 1) if accumulator_columns(-(-m // n), a_bits) <= MOST_COLUMNS)
    return dataclasses.replace(decode_tiling(-(-m // parts), k, a_bits, w_bits), parts=parts)


def accumulator_columns(m: int, a_bits: int, group_size: int | None = None) -> int:
    """Columns of the accumulator: all planes of all tokens."""
    return x_planes(m, a_bits, group_size) * token_columns(m)
