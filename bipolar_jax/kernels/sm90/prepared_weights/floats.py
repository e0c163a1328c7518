"""What threads do with prepared weights under float activations: fields become pairs of 16-bit floats.

A code of up to 7 bits is the low end of a mantissa: B + u, where B is the power of two whose last place is 1. B is
subtracted, and one fused multiply-add makes s * u + o. All of it is exact: values of integer groups are from -128 to
127, and those of the format at most 255. B * s could not be subtracted from o beforehand: it has too many digits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.float_types import FloatType
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, Expansion, StepWords
from bipolar_jax.packing.fields import CHUNK_WORDS, OFFSET_BIAS, REGISTERS, expand_tile

_EVERY_BYTE, _EVERY_HALF = 0x01010101, 0x00010001
_SIGN = 128  # of a byte
PAIRS = 2  # of a register: its bytes 0 and 1, and its bytes 2 and 3
# Bytes 0 and 1, or 2 and 3, of the first operand, each below the first byte of the second.
SELECTORS = (0x4140, 0x4342)

# (s, o), each twice in a word, of one row.
RowTerms = tuple[Value, Value]


@dataclasses.dataclass(frozen=True)
class FloatExpansion:
    """How fields become floats.

    Attributes:
      format: of the codes.
      chunks: chunks of a stage with terms of their own; 0 without groups, whose values are those of the format.
      float_type: of the result.
    """

    format: BipolarFormat
    chunks: int
    float_type: FloatType

    @property
    def fields(self) -> Expansion:
        """How registers of codes are made of fields."""
        return Expansion(self.format.bits, self.chunks)

    def load_terms(self, terms: Pointer | None, lane: Value, half: int) -> list[list[RowTerms]]:
        """The terms of a lane's four rows, for each chunk of half a stage, or the one around it.

        Args:
          terms: as in `Expansion.load_terms`; None without groups.
          lane: of the thread in its warp.
          half: which half of the stage.
        """
        if terms is None:
            return [self._of_format]
        return [self._of_words(words) for words in self.fields.load_term_words(terms, lane, half)]

    def terms_by_step(self, terms: Pointer | None, lane: Value, half: int) -> Callable[[int], list[list[RowTerms]]]:
        """`load_terms`, of which a function of the step makes what `fragments` reads: fewer registers."""
        loaded = None if terms is None else self.fields.load_term_words(terms, lane, half)

        @functools.cache
        def of_chunk(chunk: int) -> list[RowTerms]:
            return self._of_format if loaded is None else self._of_words(loaded[chunk])

        def of_step(step: int) -> list[list[RowTerms]]:
            count, quarters = 1 if loaded is None else len(loaded), 2 * HALF_STEPS
            return [
                of_chunk((quarter if quarter // 2 == step else 2 * step) * count // quarters)
                for quarter in range(quarters)
            ]

        return of_step

    def values(self, codes: Value, terms: RowTerms) -> list[Value]:
        """The PAIRS pairs of values of a register of codes."""
        scale, offset = terms
        return [
            ptx.fma_pairs(self.float_type.name, self._numbers(codes, selector, self._signed), scale, offset)
            for selector in SELECTORS
        ]

    def fragments(self, words: StepWords, terms: list[list[RowTerms]], step: int) -> list[list[Value]]:
        """The PAIRS pairs of values of each of the REGISTERS registers of a step.

        Args:
          words: the lane's, of this step.
          terms: of `load_terms`, of the half that the step is in.
          step: which step of the half.
        """
        registers = []
        for register in range(REGISTERS):
            block, half, row = register // 4, register // 2 % 2, register % 2
            own = terms[(2 * step + half) * len(terms) // (2 * HALF_STEPS)][2 * block + row]
            registers.append(self.values(self.fields.codes(words, register), own))
        return registers

    @property
    def term_words(self) -> int:
        """Words of the terms of a stage and part."""
        return self.chunks * CHUNK_WORDS

    def of_tile(self, words: Array, terms: Array | None) -> Float[Array, "rows positions"]:
        """The values of a tile and stage, in jnp; `packing.fields.expand_tile` has the arguments."""
        numbers = expand_tile(words, terms)
        return (2 * numbers - self.format.max_value if terms is None else numbers - OFFSET_BIAS).astype(jnp.float32)

    def multiply_step(self, registers: list[list[Value]], tokens: list[Value], sums: list[Value]) -> list[Value]:
        """sums + weights . tokens over a step, or half of one: an instruction for each half.

        Args:
          registers: pairs of values of the rows r and r + 8 of one block, for the first half of the step, then the
            second.
          tokens: two words for either half, see `float_tokens`.
          sums: float32, four.
        """
        for half in range(len(registers) // 2):
            low, high = registers[2 * half : 2 * half + 2]
            a = [low[0], high[0], low[1], high[1]]
            sums = ptx.multiply_add_tiles(self.float_type.name, a, tokens[2 * half : 2 * half + 2], sums)
        return sums

    @property
    def _signed(self) -> bool:
        return self.format.bits == 8

    @property
    def _of_format(self) -> list[RowTerms]:
        """2 u - W; codes that have the sign bit of a byte come as u - 128, and 255 = 2 * 128 - 1."""
        shift = 1 if self._signed else -self.format.max_value
        return [(self._constant(2), self._constant(shift))] * 4

    def _of_words(self, words: list[Value]) -> list[RowTerms]:
        """The terms of a chunk's rows, of a word for either block."""
        return [row for word in words for row in self._rows_of(word)]

    def _rows_of(self, word: Value) -> list[RowTerms]:
        """The terms of the two rows of a word: bytes s and o + 128 of one, then of the other."""
        scales = self._numbers(word, 0x4240, signed=self.format.bits == 1)
        if self.format.bits == 1:  # up to 255
            scales = self._plus(scales, _SIGN)
        offsets = self._numbers(word, 0x4341, signed=True)
        assert OFFSET_BIAS == _SIGN
        return [(ptx.pick_bytes(scales, scales, s), ptx.pick_bytes(offsets, offsets, s)) for s in (0x1010, 0x3232)]

    def _numbers(self, word: Value, selector: int, signed: bool, less: int = 0) -> Value:
        """Two bytes of a word as floats: b - less, b below 128 in bfloat16; or b - 128 if `signed`."""
        base, base_bits = self.float_type.base, self.float_type.base_bits
        high = ptx.int32((base_bits >> 8) * _EVERY_BYTE)
        if not signed or base > 2 * _SIGN:
            # B + b, less B and 128.
            return self._plus(ptx.pick_bytes(word, high, selector), -base - (_SIGN if signed else less))
        # Of b - 128 in two's complement: B + the low bits, less B or, with the sign, 2 B.
        pair = ptx.pick_bytes(ptx.flip_bits(word, _SIGN * _EVERY_BYTE), high, selector)
        negative = 0x8000 | base_bits
        low = ptx.masked_or(pair, (_SIGN - 1) * _EVERY_HALF, base_bits * _EVERY_HALF)
        less = ptx.masked_or(pair, _SIGN * _EVERY_HALF, negative * _EVERY_HALF)
        return ptx.fma_pairs(self.float_type.name, low, self._constant(1), less)

    def _plus(self, numbers: Value, term: float) -> Value:
        return ptx.fma_pairs(self.float_type.name, numbers, self._constant(1), self._constant(term))

    def _constant(self, number: float) -> Value:
        return ptx.int32(self.float_type.bits_of(number) * _EVERY_HALF)
