"""What threads do with float scales of groups where tensor cores multiply 16-bit floats: codes become scaled numbers.

A byte between the bytes of a power of two B as a float32 is B plus the code u, exactly. So a number S * (u - W / 2) + o
is one multiply-add, S * (B + u) + t with t = o - S * (B + W / 2), before it is rounded to a 16-bit float. Of t float32
loses half a unit in its last place: 2^-24 |o|, and 2^-17 S, of codes of 8 bits 2^-9 S; less than the 16-bit float loses
of the group's largest number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, StepWords
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import FloatScaling
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.packing.fields import PARTS, STAGE, TILE_ROWS, expand_tile
from bipolar_jax.packing.float_terms import part_float_terms, term_words


class _Base(NamedTuple):
    """B: its float32 word, the selector of `pick_bytes` for a code's byte 0 in it, and where the byte's index goes."""

    number: float
    word: int
    selector: int
    shift: int


# The higher the code's place in the word, the smaller is B; the highest bit of the byte there belongs to the exponent.
_OF_SEVEN_BITS, _OF_EIGHT_BITS = _Base(2.0**7, 0x43000000, 0x7044, 8), _Base(2.0**15, 0x47000000, 0x7404, 4)


@dataclasses.dataclass(frozen=True)
class ScaledFloatExpansion(FloatExpansion):
    """`FloatExpansion` by terms of the form "offsets", whose numbers must fit the 16-bit float."""

    @property
    def unit(self) -> float:
        return 1.0

    @property
    def term_words(self) -> int:
        return term_words("offsets", self.chunks)

    def terms_by_step(self, terms: Pointer, lane: Value, half: int) -> Callable[[int], list]:
        scaling = FloatScaling("offsets", -self.format.max_value / 2)
        count, first = max(1, self.chunks // HALVES), half * self.chunks // HALVES

        @functools.cache
        def of_chunk(chunk: int) -> list[tuple[Value, Value]]:
            rows = scaling.load_terms(terms, first + chunk, lane)
            zero = ptx.float32(-self._base.number - self.format.max_value / 2)
            return [(scale, ptx.fma(scale, zero, offset)) for scale, _, offset in rows]

        def of_step(step: int) -> list:
            quarters = 2 * HALF_STEPS
            return [
                of_chunk((quarter if quarter // 2 == step else 2 * step) * count // quarters)
                for quarter in range(quarters)
            ]

        return of_step

    def values(self, words: StepWords, register: int, terms: tuple[Value, Value]) -> list[Value]:
        codes, (scale, lowered), base = self.fields.codes(words, register), terms, self._base
        numbers = []
        for byte in range(4):
            selector = base.selector | byte << base.shift
            code = ptx.as_float(ptx.pick_bytes(codes, ptx.int32(base.word), selector))
            numbers.append(ptx.fma(scale, code, lowered))
        return [ptx.rounded_pair(self.float_type.name, *numbers[first::2]) for first in range(2)]

    def of_tile(self, words: Array, terms: Array) -> Float[Array, "rows positions"]:
        scale, zero, offset = (
            term.reshape(PARTS, 2, -1, self.chunks).swapaxes(0, 1).reshape(TILE_ROWS, self.chunks, 1)
            for term in part_float_terms(terms, self.format, "offsets")
        )
        codes = expand_tile(words, None).reshape(TILE_ROWS, self.chunks, -1).astype(jnp.float32)
        lowered = offset + scale * (zero - self._base.number)
        numbers = (scale * (codes + self._base.number) + lowered).astype(self.float_type.dtype)
        return numbers.reshape(TILE_ROWS, STAGE).astype(jnp.float32)

    @property
    def _base(self) -> _Base:
        return _OF_SEVEN_BITS if self.format.bits < 8 else _OF_EIGHT_BITS
