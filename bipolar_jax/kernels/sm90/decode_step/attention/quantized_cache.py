"""What of attention to a cache of 8 or 4 bits is written for threads, as functions of arrays: see `attention_rows`."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import ALONG_ROWS, MATRIX, lane_and_warp, numbers_of, word_of
from bipolar_jax.kernels.sm90.decode_step.attention import float_cache_threads, quantized_cache_threads
from bipolar_jax.kernels.sm90.decode_step.attention.float_cache import (
    HALF_SUMS,
    QUERY_LAYOUT,
    along_rows,
    emulated_sums,
    half_of_sums,
)

_ROWS = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ALONG_ROWS)


def row_scores(keys, query: Array, bits: int, *, emulate: bool) -> Float[Array, "64"]:
    """Signed codes of keys . query, float32, in the layout ALONG_ROWS.

    Args:
      keys: ref in shared memory, uint8 [64, 16 * bits] in the swizzle of that width.
      query: of `attention_rows.load_query`, shared for codes.
      bits: 8 or 4.
    """
    if emulate:
        return jnp.sum(_signed_codes(keys, bits) * query, axis=1)

    @plgpu.inline_mgpu(arg_types=(_swizzled(bits), QUERY_LAYOUT), return_type=_ROWS)
    def inline(_, keys, query):
        place = lane_and_warp()
        return along_rows(
            quantized_cache_threads.scores(bits, ptx.pointer(keys, ptx.SHARED), numbers_of(query), *place)
        )

    return inline(keys, query)


def query_sum(query: Array, *, emulate: bool) -> Float[Array, "64"]:
    """The sum of the query's numbers, in all rows."""
    if emulate:
        return jnp.full(64, jnp.sum(query))

    @plgpu.inline_mgpu(arg_types=(QUERY_LAYOUT,), return_type=_ROWS)
    def inline(_, query):
        return along_rows([quantized_cache_threads.query_sum(numbers_of(query))] * 2)

    return inline(query)


def add_values(
    sums: Sequence[Float[Array, "64 32"]],
    before: Float[Array, "64"],
    values,
    weights: Float[Array, "64"],
    bits: int,
    *,
    emulate: bool,
) -> tuple[Float[Array, "64 32"], ...]:
    """sums * before + weights . signed codes of values: arguments as of `row_scores`, `attention_rows.add_values`."""
    if emulate:
        return emulated_sums(sums, before, jnp.split(_signed_codes(values, bits), 2, axis=1), weights)

    @plgpu.inline_mgpu(
        arg_types=(*[MATRIX] * 2, ALONG_ROWS, ALONG_ROWS, _swizzled(bits)), return_type=(HALF_SUMS, HALF_SUMS)
    )
    def inline(_, *arrays):
        *sums, before, weights, values = arrays
        factor = ptx.as_float(word_of(before.registers.flat[0]))
        lane, warp = lane_and_warp()
        both = [ptx.as_float(word_of(register)) for register in weights.registers.flat]
        words = float_cache_threads.spread_weights(quantized_cache_threads.NUMBER, both, lane)
        numbers = [ptx.multiply(x, factor) for half in sums for x in numbers_of(half)]
        numbers = quantized_cache_threads.add_values(bits, ptx.pointer(values, ptx.SHARED), words, lane, warp, numbers)
        return tuple(half_of_sums(numbers[start : start + 16]) for start in (0, 16))

    return inline(*sums, before, weights, values)


def _signed_codes(ref, bits: int) -> Float[Array, "64 128"]:
    codes = ref[...].astype(jnp.int32)
    if bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=1)
    return (codes - (1 << (bits - 1))).astype(jnp.float32)


def _swizzled(bits: int) -> plgpu.RefType:
    return plgpu.RefType((plgpu.SwizzleTransform(quantized_cache_threads.row_bytes(bits)),))
