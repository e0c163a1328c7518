"""Attention to a cache of 8 or 4 bits: scores and sums of values, as functions of arrays; compare `float_cache`."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import ALONG_ROWS, MATRIX, as_array, lane_and_warp, numbers_of, word_of
from bipolar_jax.kernels.sm90.decode_step.attention import float_fragments, quantized_fragments
from bipolar_jax.kernels.sm90.decode_step.attention.float_cache import (
    ROWS_TYPE,
    SUMS_SHAPE,
    SUMS_TYPE,
    add_values_twin,
    query_layout,
)


def _row_scores_twin(keys, query, bits):
    return jnp.sum(_signed_codes(keys, bits) * query[None], axis=1)


@with_twin(_row_scores_twin)
def row_scores(keys, query: Array, bits: int) -> Float[Array, "64"]:
    """Signed codes of keys . query, float32, in the layout ALONG_ROWS.

    Args:
      keys: ref in shared memory, uint8 [64, bytes of a vector] in the swizzle of that width.
      query: from `float_cache.load_query`, stored for codes.
      bits: 8 or 4.
    """

    @plgpu.inline_mgpu(arg_types=(_swizzled(keys), query_layout(query.shape[0])), return_type=ROWS_TYPE)
    def inline(_, keys, query):
        lane_warp = lane_and_warp()
        keys = ptx.pointer(keys, ptx.SHARED)
        return as_array(quantized_fragments.scores(bits, keys, numbers_of(query), *lane_warp), (64,), ALONG_ROWS)

    return inline(keys, query)


@with_twin(lambda query: jnp.full(64, jnp.sum(query)))
def query_sum(query: Array) -> Float[Array, "64"]:
    """The sum of the query's elements, in all rows."""

    @plgpu.inline_mgpu(arg_types=(query_layout(query.shape[0]),), return_type=ROWS_TYPE)
    def inline(_, query):
        return as_array([quantized_fragments.query_sum(numbers_of(query))] * 2, (64,), ALONG_ROWS)

    return inline(query)


def _add_values_twin(sums, before, values, weights, bits):
    return add_values_twin(sums, before, jnp.split(_signed_codes(values, bits), len(sums), axis=1), weights)


@with_twin(_add_values_twin)
def add_values(
    sums: Sequence[Float[Array, "64 32"]],
    before: Float[Array, "64"],
    values,
    weights: Float[Array, "64"],
    bits: int,
) -> tuple[Float[Array, "64 32"], ...]:
    """sums * before + weights . signed codes of values; `values` as the keys of `row_scores`.

    The other arguments are those of `float_cache.add_values`.
    """

    @plgpu.inline_mgpu(
        arg_types=(*[MATRIX] * len(sums), ALONG_ROWS, ALONG_ROWS, _swizzled(values)),
        return_type=(SUMS_TYPE,) * len(sums),
    )
    def inline(_, *arrays):
        *sums, before, weights, values = arrays
        factor = ptx.as_float(word_of(before.registers.flat[0]))
        lane, warp = lane_and_warp()
        two_rows = [ptx.as_float(word_of(register)) for register in weights.registers.flat]
        words = float_fragments.spread_weights(quantized_fragments.NUMBER, two_rows, lane)
        numbers = [ptx.multiply(x, factor) for tile in sums for x in numbers_of(tile)]
        numbers = quantized_fragments.add_values(bits, ptx.pointer(values, ptx.SHARED), words, lane, warp, numbers)
        return tuple(as_array(numbers[start : start + 16], SUMS_SHAPE, MATRIX) for start in range(0, len(numbers), 16))

    return inline(*sums, before, weights, values)


def _signed_codes(ref, bits: int) -> Float[Array, "64 size"]:
    codes = ref[...].astype(jnp.int32)
    if bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=1)
    return (codes - (1 << (bits - 1))).astype(jnp.float32)


def _swizzled(codes) -> plgpu.RefType:
    return plgpu.RefType((plgpu.SwizzleTransform(codes.shape[-1]),))
