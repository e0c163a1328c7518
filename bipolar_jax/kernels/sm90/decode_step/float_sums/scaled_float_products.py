"""Products of prepared weights, whose groups have float scales, with a token of 16-bit floats.

A warp expands fields to codes as floats and multiplies them; the float32 sums of every chunk of K are scaled as
`prepared_weights.centred_floats` says.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_products import (
    FloatKind,
    add_products_of_warps,
    numbers_of_stages,
    own_numbers,
)
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_token import LANE_WORDS, STEP_WORDS
from bipolar_jax.kernels.sm90.decode_step.float_sums.row_sums import ROW_SUMS, RowSums
from bipolar_jax.kernels.sm90.decode_step.part_sums import inline_stages, multiply_own_stage
from bipolar_jax.kernels.sm90.prepared_weights.centred_floats import CentredExpansion, zeros
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import chunk_pieces, scaled_products
from bipolar_jax.packing.fields import STEPS, expand_part

# Chunks of one step each are scaled by halves: ptxas spills where it has whole steps to order.
_SPILLED_CHUNKS = 4


class ScaledFloatKind(FloatKind):
    """`FloatKind` of float scales of groups."""

    @property
    def _expansion(self) -> CentredExpansion:
        shape, layout = self.shape, self.shape.prepared
        return CentredExpansion(shape.w_format, layout.chunks, FLOATS[shape.float_token], layout.float_terms)

    def add_stages(self, total, words, terms, token, part_of_slice, valid) -> RowSums:
        return add_scaled_float_stages(total, words, terms, token, part_of_slice, valid, self._expansion)


def _add_scaled_float_stages_twin(total, words, terms, token, part_of_slice, valid, expansion):
    stages = words.shape[0]
    codes = expand_part(words[...], None).astype(jnp.float32)
    terms = terms[...]
    numbers = numbers_of_stages(token, valid, expansion.float_type.name)
    own = lax.dynamic_slice_in_dim(numbers, part_of_slice * stages, stages)
    by_chunk = own.reshape(1, stages, expansion.chunks, -1)
    (sums,) = scaled_products(codes[None], by_chunk, terms[None], expansion.format, expansion.kind)
    return add_products_of_warps(total, expansion.unit * sums[..., 0], part_of_slice, valid)


@with_twin(_add_scaled_float_stages_twin)
def add_scaled_float_stages(
    total: RowSums,
    words: Any,
    terms: Any,
    token: Any,
    part_of_slice: Int[Array, ""],
    valid: Any,
    expansion: CentredExpansion,
) -> RowSums:
    """Adds a load's products to the sums of a warpgroup's warps; arguments as `part_sums.add_stages` has them."""
    stages = words.shape[0]

    def of_warp(total, pointers, part_of_slice, valid):
        return add_scaled_float_stages_of_warp(total, pointers, part_of_slice, valid, stages, expansion)

    return inline_stages(of_warp, total, words, terms, token, part_of_slice, valid, ROW_SUMS)


# Below: for use within `plgpu.inline_mgpu`.


def add_scaled_float_stages_of_warp(
    total: list[Value],
    pointers: Sequence[Pointer],
    part_of_slice: Value,
    valid: Sequence[Value],
    stages: int,
    expansion: CentredExpansion,
) -> list[Value]:
    """The thread's numbers of `add_scaled_float_stages`; `valid` is empty or one word."""

    def multiply(words: Pointer, terms: list[Pointer], token: Pointer, lane: Value) -> list[Value]:
        return _multiply_stage(total, words, terms[0], token, lane, expansion)

    options = {"bits": expansion.fields.bits, "terms_bytes": 4 * expansion.term_words, "locate": own_numbers}
    return multiply_own_stage(total, pointers, part_of_slice, valid, stages, multiply=multiply, **options)


def _multiply_stage(
    total: list[Value], words: Pointer, terms: Pointer, token: Pointer, lane: Value, expansion: CentredExpansion
) -> list[Value]:
    """Adds a warp's products of one stage, chunk after chunk; all columns of the operand are the token."""
    total = list(total)

    @functools.cache
    def fields_of_half(half: int):
        return expansion.fields.load_fields(words, lane, half)

    pieces = 2 * STEPS if expansion.chunks == _SPILLED_CHUNKS else expansion.chunks
    for piece in range(pieces):
        # An instruction has sums of two columns, which are the same.
        products, token_sums = zeros(8), zeros(4)
        for step, first, last in chunk_pieces(piece, pieces, STEPS):
            half, own_step = divmod(step, HALF_STEPS)
            registers = expansion.centred(fields_of_half(half)[own_step], own_step)
            tokens = ptx.load(ptx.advance(token, 4 * STEP_WORDS * step), LANE_WORDS)[2 * first : 2 * last]
            for block in range(2):
                own = slice(4 * block, 4 * block + 4)
                weights = registers[4 * block + 2 * first : 4 * block + 2 * last]
                products[own] = expansion.multiply_step(weights, tokens, products[own])
            token_sums = expansion.token_sums(tokens, token_sums)
        row_terms = expansion.load_chunk_terms(terms, piece * expansion.chunks // pieces, lane)
        total = [
            expansion.scaling.add(number, own_terms, products[2 * row], token_sums[0])
            for row, (number, own_terms) in enumerate(zip(total, row_terms, strict=True))
        ]
    return total
