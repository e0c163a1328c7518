"""What threads do with prepared weights under float activations: fields become pairs of 16-bit floats.

A code is the low end of a mantissa whose exponent is 0: a subnormal number, u times the lowest place, at no cost. At
bit 4 it is 16 times as much, which the scale takes back. Bytes 0 and 2 of a word are a pair by one mask, bytes 1 and 3
of the word shifted by 8. One fused multiply-add by s * lift makes (s * u + o) * unit, unit = lowest * lift. All of it
is exact: values of integer groups are from -128 to 127, and those of the format at most 255. The epilogue divides sums
by the unit, a power of two. (A code between the bits of a power of two B is B + u: B would have to be subtracted first,
since B * s has too many digits to be subtracted from o.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.float_types import FloatType
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, Expansion, StepWords
from bipolar_jax.packing.fields import CHUNK_WORDS, OFFSET_BIAS, REGISTERS, expand_tile, fields_of

_EVERY_BYTE, _EVERY_HALF = 0x01010101, 0x00010001
PAIRS = 2  # of a register: its bytes 0 and 2, and its bytes 1 and 3
# Bytes 0 and 2, or 1 and 3, of the first operand, each below the first byte of the second.
SELECTORS = (0x4240, 0x4341)
PLACES = (0, 4)  # of the lowest bit of codes in 16-bit numbers

# s * lift / 2^place for PLACES, and o * unit, each twice in a word, of one row.
RowTerms = tuple[tuple[Value, Value], Value]

_LARGEST_SCALE = 255  # of 1 bit; others are at most half of it
_SHARED = 2.0**6  # moves from one factor of a scale of 1 bit to the other, or the first would be infinite


def unit_of_values(float_type: FloatType) -> float:
    """The power of two that `FloatExpansion` multiplies values by."""
    return float_type.lowest * float_type.lift


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

    def values(self, words: StepWords, register: int, terms: RowTerms) -> list[Value]:
        """The PAIRS pairs of values of a register, times `unit`; `fragments` has the words."""
        (pairs, place), (scales, offset) = self.code_pairs(words, register), terms
        return [ptx.fma_pairs(self.float_type.name, pair, scales[PLACES.index(place)], offset) for pair in pairs]

    def code_pairs(self, words: StepWords, register: int) -> tuple[list[Value], int]:
        """The PAIRS pairs of codes of a register as 16-bit integers, times 2^place; and the place, one of PLACES."""
        field, *others = fields_of(self.format.bits, words.step)[register]
        if others or field.width == 8:
            codes = self.fields.codes(words, register)
            return [ptx.pick_bytes(codes, ptx.int32(0), selector) for selector in SELECTORS], 0
        place = max(place for place in PLACES if place <= field.position)
        codes, mask = words.words[field.word], ((1 << field.width) - 1 << place) * _EVERY_HALF
        if field.position > place:
            codes = ptx.shift_right(codes, field.position - place)
        return [ptx.bits_of(codes, mask), ptx.bits_of(ptx.shift_right(codes, 8), mask)], place

    @property
    def unit(self) -> float:
        """What a product of 1 adds to sums."""
        return unit_of_values(self.float_type)

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
            registers.append(self.values(words, register, own))
        return registers

    @property
    def term_words(self) -> int:
        """Words of the terms of a stage and part."""
        return self.chunks * CHUNK_WORDS

    def of_tile(self, words: Array, terms: Array | None) -> Float[Array, "rows positions"]:
        """The values of a tile and stage times `unit`, in jnp; `packing.fields.expand_tile` has the arguments."""
        return self.in_units(expand_tile(words, terms), terms is not None)

    def in_units(self, expanded: Int[Array, "*rows positions"], grouped: bool) -> Float[Array, "*rows positions"]:
        """Values times `unit`, of codes, or of s * u + o + 128."""
        values = expanded - OFFSET_BIAS if grouped else 2 * expanded - self.format.max_value
        return values.astype(jnp.float32) * self.unit

    def multiply_step(self, registers: list[list[Value]], tokens: list[Value], sums: list[Value]) -> list[Value]:
        """sums + weights . tokens over a step, or half of one: an instruction for each half.

        Args:
          registers: pairs of values of the rows r and r + 8 of one block, for the first half of the step, then the
            second.
          tokens: two words for either half, see `token_order`.
          sums: float32, four.
        """
        for half in range(len(registers) // 2):
            low, high = registers[2 * half : 2 * half + 2]
            a = [low[0], high[0], low[1], high[1]]
            sums = ptx.multiply_add_tiles(self.float_type.name, a, tokens[2 * half : 2 * half + 2], sums)
        return sums

    @property
    def _of_format(self) -> list[RowTerms]:
        """Of 2 u - W."""
        scales = tuple(self._constant(2 * self.float_type.lift / 2**place) for place in PLACES)
        return [(scales, self._constant(-self.format.max_value * self.unit))] * 4

    def _of_words(self, words: list[Value]) -> list[RowTerms]:
        """The terms of a chunk's rows, of a word for either block."""
        return [row for word in words for row in self._rows_of(word)]

    def _rows_of(self, word: Value) -> list[RowTerms]:
        """The terms of the two rows of a word: bytes s and o + 128 of one, then of the other."""
        name, lift = self.float_type.name, self.float_type.lift
        if self.format.bits == 1 and self.float_type.base <= _LARGEST_SCALE:
            # A subnormal number, times 1 / lowest and lift.
            scales = ptx.pick_bytes(word, ptx.int32(0), 0x4240)
            for factor in (1 / self.float_type.lowest / _SHARED, lift * _SHARED):
                scales = ptx.fma_pairs(name, scales, self._constant(factor), ptx.int32(0))
        else:  # B * lift + s * lift
            base = self.float_type.bits_of(self.float_type.base * lift) >> 8
            scales = self._plus(
                ptx.pick_bytes(word, ptx.int32(base * _EVERY_BYTE), 0x4240), -self.float_type.base * lift
            )
        offsets = ptx.pick_bytes(word, ptx.int32(0), 0x4341)
        offsets = ptx.fma_pairs(name, offsets, self._constant(lift), self._constant(-OFFSET_BIAS * self.unit))
        placed = [scales, ptx.fma_pairs(name, scales, self._constant(2.0 ** -PLACES[1]), ptx.int32(0))]
        return [
            (tuple(ptx.pick_bytes(each, each, s) for each in placed), ptx.pick_bytes(offsets, offsets, s))
            for s in (0x1010, 0x3232)
        ]

    def _plus(self, numbers: Value, term: float) -> Value:
        return ptx.fma_pairs(self.float_type.name, numbers, self._constant(1), self._constant(term))

    def _constant(self, number: float) -> Value:
        return ptx.int32(self.float_type.bits_of(number) * _EVERY_HALF)
