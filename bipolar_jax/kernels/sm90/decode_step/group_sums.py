"""A stage of prepared weights multiplied as codes: sums of each group are scaled, instead of its weights.

The bytes of a group's weights are s u + o + 128, so their products with the token's numbers x add up to
s sum(u x) + (o + 128) sum(x). Codes of 4 bits need not even be moved to the low bits of a byte: a register holds
u 2^j, with the same j for all that is added to a sum, and the sum is shifted. That leaves one or two instructions for
four weights where scaling them takes three. The tensor core adds up the token's numbers beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion, StepWords
from bipolar_jax.packing.fields import REGISTERS, STEPS, fields_of

_EVERY_BYTE = 0x01010101
_MOST_CHUNKS = 2  # of a stage: with more of them scaling sums costs as much as scaling weights


def sums_are_scaled(expansion: Expansion) -> bool:
    """Whether `multiply_codes` serves these weights, and is quicker."""
    return expansion.bits in (1, 2, 4) and 1 <= expansion.chunks <= _MOST_CHUNKS


def multiply_codes(
    total: Sequence[Value],
    words: Pointer,
    terms: Pointer,
    tokens: Sequence[Value],
    lane: Value,
    expansion: Expansion,
    one_token: bool,
) -> list[Value]:
    """Adds a warp's products of one stage.

    Args:
      total: eight sums of the lane, as `part_sums` has them.
      words, terms: of the stage, in shared memory.
      tokens: the words of the lane's segment.
      expansion: of `sums_are_scaled`.
      one_token: whether all columns are the same token; then of two equal sums of a lane one stays as it is.
    """
    total, ones = list(total), [ptx.int32(_EVERY_BYTE)] * 4
    fields = [expansion.load_fields(words, lane, half) for half in range(HALVES)]
    pairs = [pair for half in range(expansion.chunks) for pair in expansion.load_term_words(terms, lane, half)]
    for chunk, pair in enumerate(pairs):
        sums, token_sums = [ptx.int32(0)] * 8, [ptx.int32(0)] * 4
        for step in range(chunk * STEPS // len(pairs), (chunk + 1) * STEPS // len(pairs)):
            half, own_step = divmod(step, HALF_STEPS)
            codes = codes_in_place(fields[half][own_step], expansion)
            x = tokens[2 * step : 2 * step + 2]
            for block in (0, 4):
                sums[block : block + 4] = ptx.multiply_add_byte_tiles(
                    codes[block : block + 4], x, sums[block : block + 4]
                )
            token_sums = ptx.multiply_add_byte_tiles(ones, x, token_sums)
        for block in range(2):
            for row in range(2):
                scale = ptx.pick_bytes(pair[block], ptx.int32(0), 0x4440 + 2 * row)
                offset = ptx.pick_bytes(pair[block], ptx.int32(0), 0x4441 + 2 * row)
                for column in range(1 if one_token else 2):
                    at = 4 * block + 2 * row + column
                    of_codes = ptx.shift_right_signed(sums[at], shift_of(expansion.bits, 4 * block + row))
                    total[at] = ptx.plus(total[at], ptx.times(of_codes, scale))
                    total[at] = ptx.plus(total[at], ptx.times(token_sums[column], offset))
    return total


def codes_in_place(words: StepWords, expansion: Expansion) -> list[Value]:
    """Registers of codes times 2^`shift_of`, of a step's words."""
    registers = []
    for register in range(REGISTERS):
        shift = shift_of(expansion.bits, register)
        if shift:
            (field,) = fields_of(expansion.bits, words.step)[register]
            mask = ((1 << field.width) - 1 << shift) * _EVERY_BYTE
            registers.append(ptx.bits_of(words.words[field.word], mask))
        else:
            registers.append(expansion.codes(words, register))
    return registers


def shift_of(bits: int, register: int) -> int:
    """The lowest bit of a register's codes in `codes_in_place`: the same for all steps and both halves of a row."""
    return fields_of(bits, 0)[register][0].position if bits == 4 else 0
