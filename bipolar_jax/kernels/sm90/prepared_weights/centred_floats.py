"""What threads do with float scales of groups under float tokens: multiply codes as floats, and scale sums of chunks.

With d = u - H, H = 2^(bits - 1), of codes u, and float tokens x, a chunk of K in which no group ends adds

    S * (P + (Z + H) * C) + o * C,     P = sum_k x d,   C = sum_k x

to a row's float32 sum; S, Z and o are the chunk's terms (`packing.float_terms`). d is exact in either 16-bit float, and
around 0, so that P and C are no larger than what they make. C comes from a tile whose weights are ones. Both are in
units of `FloatExpansion.unit`, and so is the sum.
"""

from __future__ import annotations

import dataclasses

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import FloatScaling, RowTerms
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.packing.float_terms import FloatTerms, term_words


@dataclasses.dataclass(frozen=True)
class CentredExpansion(FloatExpansion):
    """`FloatExpansion` to d, whose terms scale sums.

    Attributes:
      kind: the form of the terms.
    """

    kind: FloatTerms

    @property
    def term_words(self) -> int:
        return term_words(self.kind, self.chunks)

    @property
    def centre(self) -> int:
        """H."""
        return 1 << (self.format.bits - 1)

    @property
    def scaling(self) -> FloatScaling:
        """What threads do with the terms."""
        return FloatScaling(self.kind, -self.format.max_value / 2)

    def load_chunk_terms(self, terms: Pointer, chunk: int, lane: Value) -> list[RowTerms]:
        """S, Z + H and o of a lane's four rows; arguments as of `FloatScaling.load_terms`."""
        centre = ptx.float32(float(self.centre))
        return [
            (scale, ptx.add(zero, centre), offset)
            for scale, zero, offset in self.scaling.load_terms(terms, chunk, lane)
        ]

    def centred(self, words, step: int) -> list[list[Value]]:
        """The pairs of d of each register of a step; arguments as of `fragments`."""
        return self.fragments(words, [[None] * 4], step)

    def values(self, words: StepWords, register: int, terms: None) -> list[Value]:
        del terms
        pairs, place = self.code_pairs(words, register)
        lift, centre = self._constant(self.float_type.lift / 2**place), self._constant(-self.centre * self.unit)
        return [ptx.fma_pairs(self.float_type.name, pair, lift, centre) for pair in pairs]

    def token_sums(self, tokens: list[Value], sums: list[Value]) -> list[Value]:
        """sums + C of the lane's two columns, twice."""
        ones = [self._constant(self.unit)] * 2
        return self.multiply_step([ones] * len(tokens), tokens, sums)


def zeros(count: int) -> list[Value]:
    """Float32 sums to start a chunk with."""
    return [ptx.float32(0.0)] * count
