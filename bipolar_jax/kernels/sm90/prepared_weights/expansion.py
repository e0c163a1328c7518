"""What threads do with prepared weights: load fields and the terms of their groups, and expand them to bytes.

With groups a register of four codes becomes four weights by one multiply-add, word * s + 0x01010101 * (o + 128): no
byte carries into the next, because s * u + o + 128 is from 0 to 255. Without groups the codes are the bytes.
"""

from __future__ import annotations

import dataclasses

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.packing.fields import CHUNK_WORDS, REGISTERS, STEPS, VECTOR, WORDS_PER_VECTOR, fields_of

HALVES = 2  # of a stage
HALF_STEPS = STEPS // HALVES
_EVERY_BYTE = 0x01010101


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How fields become bytes.

    Attributes:
      bits: of the codes.
      chunks: chunks of a stage with terms of their own; 0 without groups.
    """

    bits: int
    chunks: int

    def load_fields(self, words: Pointer, lane: Value, half: int) -> list[list[Value]]:
        """A lane's words of each step of half a stage.

        Args:
          words: uint32 [bits, WORDS_PER_VECTOR] in shared memory, one part and stage.
          lane: of the thread in its warp.
          half: which half of the stage.
        """
        mine = ptx.advance(words, ptx.times(lane, 4 * VECTOR))
        start, count, loaded = HALF_STEPS * half * self.bits, HALF_STEPS * self.bits, []
        while len(loaded) < count:
            vector, slot = divmod(start + len(loaded), VECTOR)
            at_once = min(VECTOR - slot, count - len(loaded))
            loaded += ptx.load(ptx.advance(mine, 4 * (vector * WORDS_PER_VECTOR + slot)), at_once)
        return [loaded[step * self.bits : (step + 1) * self.bits] for step in range(HALF_STEPS)]

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

    def fragments(self, words: list[Value], terms: list[list[tuple[Value, Value]]], step: int) -> list[Value]:
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

    def codes(self, words: list[Value], register: int) -> Value:
        """The codes of one register, a byte each, of a step's words."""
        codes = None
        for word, position, width, shift in fields_of(self.bits)[register]:
            if width == 8:
                return words[word]
            moved = ptx.shift_right(words[word], position - shift) if position >= shift else None
            if moved is None:
                moved = ptx.shift_left(words[word], shift - position)
            field = ptx.bits_of(moved, ((1 << width) - 1 << shift) * _EVERY_BYTE)
            codes = field if codes is None else ptx.either_bits(codes, field)
        return codes
