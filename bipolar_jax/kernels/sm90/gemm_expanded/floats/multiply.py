"""Products of 16-bit floats: weights expanded to bfloat16 or float16 in registers, tokens floats in shared memory.

A stage of tokens is two tiles of 64 numbers a row, in the order in which `prepared_weights.token_order` pairs them:
then the registers of codes that the int8 tensor cores would read, m64nNk32, become operands of two instructions
m64nNk16, one for either half of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array

from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.gemm_expanded.multiply import of_half
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS
from bipolar_jax.kernels.sm90.prepared_weights.floats import PAIRS, FloatExpansion
from bipolar_jax.packing.fields import positions_of


@dataclasses.dataclass(frozen=True)
class FloatMultiplication:
    """Floats of weights times floats of tokens; a tile of tokens is half a stage.

    Attributes:
      expansion: of fields to floats.
    """

    expansion: FloatExpansion

    @property
    def kind(self) -> OperandKind:
        return self.expansion.float_type.name

    @property
    def bits(self) -> int:
        return self.expansion.format.bits

    @property
    def term_words(self) -> int:
        return self.expansion.term_words

    def fragments(self, words: Pointer, terms: Pointer | None, lane: Value, half: int) -> Iterator[list[Value]]:
        fields = self.expansion.fields.load_fields(words, lane, half)
        terms_of = self.expansion.terms_by_step(terms, lane, half)
        for step in range(HALF_STEPS):
            registers = self.expansion.fragments(fields[step], terms_of(step), step)
            for half_step in range(2):
                # Of either block: rows r and r + 8 at the first pair, then both at the second.
                yield [
                    registers[4 * block + 2 * half_step + row][pair]
                    for block in range(2)
                    for pair in range(PAIRS)
                    for row in range(2)
                ]

    def first_step(self, half: int) -> int:
        return 0

    def operands(self, words: Array, terms: Array | None, tokens: Array, half: int) -> tuple[Array, Array]:
        weights = of_half(self.expansion.of_tile(words, terms), half)
        return weights.astype(jnp.float32), positions_of(tokens, "floats").astype(jnp.float32)
