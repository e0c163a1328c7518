"""What threads do with float scales of groups where tensor cores multiply 16-bit floats: codes become scaled numbers.

A number S * (u - W / 2) + o is computed in float32 with one rounding, and rounded to a 16-bit float. A byte between the
bytes of 2^15 as a float32 is 2^15 plus the code, exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, StepWords
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import FloatScaling
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.packing.fields import PARTS, STAGE, TILE_ROWS, expand_tile
from bipolar_jax.packing.float_terms import part_float_terms, term_words

_BASE, _BASE_WORD = 2.0**15, 0x47000000
_BYTE_OF_BASE = 0x7404  # of pick_bytes, with the code's byte in between


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
            return [(scale, offset) for scale, _, offset in scaling.load_terms(terms, first + chunk, lane)]

        def of_step(step: int) -> list:
            quarters = 2 * HALF_STEPS
            return [
                of_chunk((quarter if quarter // 2 == step else 2 * step) * count // quarters)
                for quarter in range(quarters)
            ]

        return of_step

    def values(self, words: StepWords, register: int, terms: tuple[Value, Value]) -> list[Value]:
        codes, (scale, offset) = self.fields.codes(words, register), terms
        zero = ptx.float32(-_BASE - self.format.max_value / 2)
        numbers = []
        for byte in range(4):
            code = ptx.as_float(ptx.pick_bytes(codes, ptx.int32(_BASE_WORD), _BYTE_OF_BASE | byte << 4))
            numbers.append(ptx.fma(scale, ptx.add(code, zero), offset))
        return [ptx.rounded_pair(self.float_type.name, *numbers[first::2]) for first in range(2)]

    def of_tile(self, words: Array, terms: Array) -> Float[Array, "rows positions"]:
        scale, zero, offset = (
            term.reshape(PARTS, 2, -1, self.chunks).swapaxes(0, 1).reshape(TILE_ROWS, self.chunks, 1)
            for term in part_float_terms(terms, self.format, "offsets")
        )
        codes = expand_tile(words, None).reshape(TILE_ROWS, self.chunks, -1).astype(jnp.float32)
        numbers = (scale * (codes + zero) + offset).astype(self.float_type.dtype)
        return numbers.reshape(TILE_ROWS, STAGE).astype(jnp.float32)
