"""What threads do with prepared weights: load fields and the terms of their groups, and expand them to bytes.

With groups a register of four codes becomes four weights by one multiply-add, word * s + 0x01010101 * (o + 128): no
byte carries into the next, because s * u + o + 128 is from 0 to 255. Without groups the codes are the bytes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.packing.fields import (
    CHUNK_WORDS,
    REGISTERS,
    STEPS,
    VECTOR,
    WORDS_PER_VECTOR,
    fields_of,
    step_words,
)

HALVES = 2  # of a stage
HALF_STEPS = STEPS // HALVES
_EVERY_BYTE = 0x01010101


class StepWords(NamedTuple):
    """A lane's words that hold the codes of a step, counted in its stage."""

    step: int
    words: list[Value]


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How fields become bytes.

    Attributes:
      bits: of the codes.
      chunks: chunks of a stage with terms of their own; 0 without groups.
    """

    bits: int
    chunks: int

    def load_fields(self, words: Pointer, lane: Value, half: int) -> list[StepWords]:
        """A lane's words of each step of half a stage; of 1 and 2 bits they are the same.

        Args:
          words: uint32 [bits, WORDS_PER_VECTOR] in shared memory, one part and stage.
          lane: of the thread in its warp.
          half: which half of the stage.
        """
        mine = ptx.advance(words, ptx.times(lane, 4 * VECTOR))
        by_step = {step: step_words(self.bits, step) for step in range(HALF_STEPS * half, HALF_STEPS * (half + 1))}
        start, end = min(r.start for r in by_step.values()), max(r.stop for r in by_step.values())
        loaded: dict[int, Value] = {}
        while start < end:
            vector, slot = divmod(start, VECTOR)
            at_once = min(VECTOR - slot, end - start)
            values = ptx.load(ptx.advance(mine, 4 * (vector * WORDS_PER_VECTOR + slot)), at_once)
            loaded |= zip(range(start, start + at_once), values, strict=True)
            start += at_once
        return [StepWords(step, [loaded[word] for word in own]) for step, own in by_step.items()]

    def load_terms(self, terms: Pointer, lane: Value, half: int) -> list[list[tuple[Value, Value]]]:
        """(s, o + 128 in every byte) of a lane's four rows, for each chunk of half a stage, or the one around it.

        Args:
          terms: uint32 [chunks, CHUNK_WORDS] in shared memory, one part and stage.
          lane: of the thread in its warp.
          half: which half of the stage.
        """
        return [
            [
                (
                    ptx.pick_bytes(pair, ptx.int32(0), 0x4440 + 2 * row),
                    ptx.pick_bytes(pair, ptx.int32(0), 0x1111 * (2 * row + 1)),
                )
                for pair in pairs
                for row in range(2)
            ]
            for pairs in self.load_term_words(terms, lane, half)
        ]

    def load_term_words(self, terms: Pointer, lane: Value, half: int) -> list[list[Value]]:
        """The words of `load_terms`: for each chunk that of a lane's rows of block 0, and that of block 1."""
        # Lane 4 r + t: the words 2 r, of block 0, and the next, of block 1.
        mine = ptx.advance(terms, ptx.times(ptx.shift_right(lane, 2), 8))
        first = half * self.chunks // HALVES
        chunks = range(first, max(first + 1, (half + 1) * self.chunks // HALVES))
        return [ptx.load(ptx.advance(mine, 4 * CHUNK_WORDS * chunk), 2) for chunk in chunks]

    def fragments(self, words: StepWords, terms: list[list[tuple[Value, Value]]], step: int) -> list[Value]:
        """The registers of A for one step: four of the rows of block 0, four of those of block 1.

        Args:
          words: the lane's, of this step.
          terms: of `load_terms`, of the half that the step is in; empty without groups.
          step: which step of the half.
        """
        registers = []
        for register in range(REGISTERS):
            codes = self.codes(words, register)
            if terms:
                block, half, row = register // 4, register // 2 % 2, register % 2
                scale, offset = terms[(2 * step + half) * len(terms) // (2 * HALF_STEPS)][2 * block + row]
                codes = ptx.plus(ptx.times(codes, scale), offset)
            registers.append(codes)
        return registers

    def codes(self, words: StepWords, register: int) -> Value:
        """The codes of one register, a byte each, of a step's words."""
        codes = None
        for word, position, width, shift in fields_of(self.bits, words.step)[register]:
            own = words.words[word]
            if width == 8:
                return own
            moved = ptx.shift_right(own, position - shift) if position >= shift else None
            if moved is None:
                moved = ptx.shift_left(own, shift - position)
            field = ptx.bits_of(moved, ((1 << width) - 1 << shift) * _EVERY_BYTE)
            codes = field if codes is None else ptx.either_bits(codes, field)
        return codes
