"""Products of prepared weights whose groups have float scales: a kind with float32 sums.

A warp multiplies codes; the int32 sums of every chunk of K are scaled and added in float32, as
`prepared_weights.float_scaling` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_step.float_sums import row_sums
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_sums_kind import FloatSumsKind
from bipolar_jax.kernels.sm90.decode_step.float_sums.row_sums import ROW_SUMS, RowSums
from bipolar_jax.kernels.sm90.decode_step.part_sums import (
    inline_stages,
    load_segment,
    multiply_own_stage,
    own_positions,
)
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS, HALVES, Expansion
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import FloatScaling, chunk_pieces, scaled_products
from bipolar_jax.packing.fields import STEPS, expand_part
from bipolar_jax.packing.float_terms import FloatTerms, term_words


@dataclasses.dataclass(frozen=True)
class ScaledExpansion:
    """How fields become codes, and sums of chunks are scaled.

    Attributes:
      fields: how registers of codes are made of fields.
      w_format: of the codes.
      kind: the form of the terms.
    """

    fields: Expansion
    w_format: BipolarFormat
    kind: FloatTerms

    @property
    def scaling(self) -> FloatScaling:
        """What threads do with the terms."""
        return FloatScaling(self.kind, -self.w_format.max_value / 2)


class ScaledKind(FloatSumsKind):
    """See `weight_ring.WeightKind`; slots are those of `PreparedKind`."""

    @property
    def _expansion(self) -> ScaledExpansion:
        return ScaledExpansion(super()._expansion, self.shape.w_format, self.shape.prepared.float_terms)

    def add_stages(self, total, words, terms, token, part_of_slice, valid) -> RowSums:
        return add_scaled_stages(total, words, terms, token, part_of_slice, valid, self._expansion)


def _add_scaled_stages_twin(total, words, terms, token, part_of_slice, valid, expansion):
    (stages, *_), chunks = terms.shape, expansion.fields.chunks
    codes = expand_part(words[...], None).astype(jnp.float32)
    own, active = own_positions(token, part_of_slice, valid, stages)
    by_chunk = own.astype(jnp.float32).reshape(1, stages, chunks, -1)
    (sums,) = scaled_products(codes[None], by_chunk, terms[...][None], expansion.w_format, expansion.kind)
    plgpu.commit_smem()  # for the race detector, see `part_sums`
    by_warp = jnp.where(active[:, None], jnp.concatenate([sums[..., 0]] * (WARPS // stages)), 0)
    return total + row_sums.spread_rows(by_warp)


@with_twin(_add_scaled_stages_twin)
def add_scaled_stages(
    total: RowSums,
    words: Any,
    terms: Any,
    token: Any,
    part_of_slice: Int[Array, ""],
    valid: Any,
    expansion: ScaledExpansion,
) -> RowSums:
    """Adds a load's products to the sums of a warpgroup's warps; arguments as `part_sums.add_stages` has them."""
    stages = words.shape[0]

    def of_warp(total, pointers, part_of_slice, valid):
        return add_scaled_stages_of_warp(total, pointers, part_of_slice, valid, stages, expansion)

    return inline_stages(of_warp, total, words, terms, token, part_of_slice, valid, ROW_SUMS)


# Below: for use within `plgpu.inline_mgpu`.


def add_scaled_stages_of_warp(
    total: list[Value],
    pointers: Sequence[Pointer],
    part_of_slice: Value,
    valid: Sequence[Value],
    stages: int,
    expansion: ScaledExpansion,
) -> list[Value]:
    """The thread's numbers of `add_scaled_stages`; `valid` is empty or one word."""

    def multiply(words: Pointer, terms: list[Pointer], token: Pointer, lane: Value) -> list[Value]:
        return _multiply_stage(total, words, terms[0], token, lane, expansion)

    fields = expansion.fields
    terms_bytes = 4 * term_words(expansion.kind, fields.chunks)
    return multiply_own_stage(total, pointers, part_of_slice, valid, stages, fields.bits, terms_bytes, multiply)


def _multiply_stage(
    total: list[Value], words: Pointer, terms: Pointer, token: Pointer, lane: Value, expansion: ScaledExpansion
) -> list[Value]:
    """Adds a warp's products of one stage, chunk after chunk; all columns of the operand are the token."""
    fields, scaling = expansion.fields, expansion.scaling
    by_step = [words_of_step for half in range(HALVES) for words_of_step in fields.load_fields(words, lane, half)]
    x = load_segment(token)
    for chunk in range(fields.chunks):
        row_terms = scaling.load_terms(terms, chunk, lane)
        pieces = chunk_pieces(chunk, fields.chunks, STEPS)
        tokens = [x[2 * step + first : 2 * step + last] for step, first, last in pieces]
        token_sum, _ = scaling.token_sums(tokens)
        fragments = [fields.fragments(by_step[step], [], step % HALF_STEPS) for step, _, _ in pieces]
        for block in range(2):
            weights = [
                registers[4 * block + 2 * first : 4 * block + 2 * last]
                for registers, (_, first, last) in zip(fragments, pieces, strict=True)
            ]
            products = scaling.multiply(weights, tokens)
            for row in range(2):
                index = 2 * block + row
                total = [*total]
                total[index] = scaling.add(total[index], row_terms[index], products[2 * row], token_sum)
    return total
