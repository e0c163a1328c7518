"""Products of prepared weights with a token of 16-bit floats: a kind with float32 sums.

A warp expands fields to the integer values of the weights as floats, exactly, and multiplies them with m16n8k16; all
columns of the operand are the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import choose
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import WARPGROUPS
from bipolar_jax.kernels.sm90.decode_step.float_sums import row_sums
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_sums_kind import FloatSumsKind
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_token import (
    FLOAT_SLICE_WORDS,
    LANE_WORDS,
    STEP_WORDS,
    float_positions_of,
    store_floats,
)
from bipolar_jax.kernels.sm90.decode_step.float_sums.row_sums import ROW_SUMS, RowSums
from bipolar_jax.kernels.sm90.decode_step.part_sums import inline_stages, multiply_own_stage
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS
from bipolar_jax.kernels.sm90.prepared_weights.floats import FloatExpansion
from bipolar_jax.packing.fields import CHUNK_WORDS, STEPS, expand_part


class FloatKind(FloatSumsKind):
    """See `weight_ring.WeightKind`; slots are those of `PreparedKind`, the token is [K slices, FLOAT_SLICE_WORDS]."""

    @property
    def operand_type(self) -> Any:
        return plgpu.SMEM((self.shape.token_slices, FLOAT_SLICE_WORDS), jnp.uint32)

    @property
    def _expansion(self) -> FloatExpansion:
        return FloatExpansion(self.shape.w_format, self.shape.prepared.chunks, FLOATS[self.shape.float_token])

    def take_sums(self, sums, start, count, text=0) -> Float[Array, "128"]:
        return super().take_sums(sums, start, count, text) * (1 / self._expansion.unit)

    def store_float_token(
        self,
        operand,
        warpgroup: Int[Array, ""],
        k_slices: Sequence[Float[Array, "1024"]],
        starts: Sequence[Int[Array, ""]],
        k: int,
        factor: Float[Array, ""] | None,
    ) -> None:
        """Rounds a warpgroup's K slices times the factor, and stores them for `multiply`."""
        shape, indices = self.shape, [warpgroup + i * WARPGROUPS for i in range(len(k_slices))]
        store_floats(operand, k_slices, indices, starts, k, factor, shape.float_token, shape.prepared.order)
        # Numbers that are not normalized came here from a wait without a reduction over the warp.
        synchronize(lanes_apart=True)

    def add_stages(self, total, words, terms, token, part_of_slice, valid) -> RowSums:
        return add_float_stages(total, words, terms, token, part_of_slice, valid, self._expansion)


def numbers_of_stages(token, valid, float_type: str) -> Float[Array, "stages positions"]:
    """A slice of the token by position, for twins; zeros beyond K, which is not this warpgroup's to read."""
    nothing = jnp.zeros(token.shape, token.dtype)
    own_token = token[...] if valid is None else choose(valid, lambda: token[...], lambda: nothing)
    plgpu.commit_smem()  # for the race detector, see `part_sums`
    return float_positions_of(own_token, float_type).astype(jnp.float32)


def add_products_of_warps(total, sums: Float[Array, "stages rows"], part_of_slice, valid) -> RowSums:
    """total + the sums of a load's stages, each of the warp that has the stage; for twins."""
    stages = sums.shape[0]
    active = jnp.arange(WARPS) // stages == part_of_slice % (WARPS // stages)
    active = active if valid is None else active & valid
    by_warp = jnp.where(active[:, None], jnp.concatenate([sums] * (WARPS // stages)), 0)
    return total + row_sums.spread_rows(by_warp)


def _add_float_stages_twin(total, words, terms, token, part_of_slice, valid, expansion):
    stages = words.shape[0]
    values = expansion.in_units(expand_part(words[...], None if terms is None else terms[...]), terms is not None)
    numbers = numbers_of_stages(token, valid, expansion.float_type.name)
    own = lax.dynamic_slice_in_dim(numbers, part_of_slice * stages, stages)
    sums = jnp.sum(values * own[:, None], axis=-1)
    return add_products_of_warps(total, sums, part_of_slice, valid)


@with_twin(_add_float_stages_twin)
def add_float_stages(
    total: RowSums,
    words: Any,
    terms: Any,
    token: Any,
    part_of_slice: Int[Array, ""],
    valid: Any,
    expansion: FloatExpansion,
) -> RowSums:
    """Adds a load's products to the sums of a warpgroup's warps; arguments as `part_sums.add_stages` has them."""
    stages = words.shape[0]

    def of_warp(total, pointers, part_of_slice, valid):
        return add_float_stages_of_warp(total, pointers, part_of_slice, valid, stages, expansion)

    return inline_stages(of_warp, total, words, terms, token, part_of_slice, valid, ROW_SUMS)


# Below: for use within `plgpu.inline_mgpu`.


def add_float_stages_of_warp(
    total: list[Value],
    pointers: Sequence[Pointer],
    part_of_slice: Value,
    valid: Sequence[Value],
    stages: int,
    expansion: FloatExpansion,
) -> list[Value]:
    """The thread's numbers of `add_float_stages`; `valid` is empty or one word."""

    def multiply(words: Pointer, terms: list[Pointer], token: Pointer, lane: Value) -> list[Value]:
        return _multiply_stage(total, words, terms[0] if terms else None, token, lane, expansion)

    options = {"bits": expansion.fields.bits, "terms_bytes": 4 * expansion.chunks * CHUNK_WORDS, "locate": own_numbers}
    return multiply_own_stage(total, pointers, part_of_slice, valid, stages, multiply=multiply, **options)


def own_numbers(token: Pointer, stage_of_slice: Value, lane: Value) -> Pointer:
    """Where a lane's numbers of a stage begin in the token's slice."""
    stage = ptx.times(stage_of_slice, 4 * STEPS * STEP_WORDS)
    return ptx.advance(token, ptx.plus(stage, ptx.times(ptx.bits_of(lane, 3), 4 * LANE_WORDS)))


def _multiply_stage(
    total: list[Value], words: Pointer, terms: Pointer | None, token: Pointer, lane: Value, expansion: FloatExpansion
) -> list[Value]:
    """Adds a warp's products of one stage; all columns of the operand are the token."""
    # An instruction has sums of two columns, which are the same.
    sums = [number for number in total for _ in range(2)]
    for step in range(STEPS):
        half, own_step = divmod(step, HALF_STEPS)
        if own_step == 0:  # what a whole stage needs would not fit registers
            fields = expansion.fields.load_fields(words, lane, half)
            row_terms = expansion.terms_by_step(terms, lane, half)
        registers = expansion.fragments(fields[own_step], row_terms(own_step), own_step)
        tokens = ptx.load(ptx.advance(token, 4 * STEP_WORDS * step), LANE_WORDS)
        for block in range(2):
            own = slice(4 * block, 4 * block + 4)
            sums[own] = expansion.multiply_step(registers[own], tokens, sums[own])
    return sums[::2]
