"""Attention to a cache of 16-bit floats: scores and sums of values, as functions of arrays.

`float_fragments` has the code of one thread; here it is applied to arrays, and paired with twins.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    ALONG_ROWS,
    MATRIX,
    SPLAT,
    VECTOR,
    WARPS,
    as_array,
    lane_and_warp,
    numbers_of,
    only_word,
    packed_word,
    scalar_of,
    thread_index,
    word_of,
)
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES, WARPGROUP
from bipolar_jax.kernels.sm90.decode_step.attention import float_fragments, quantized_fragments
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import ordered_bits

SUMS_SHAPE = (64, 32)  # of the sums of values over a tile of 64 elements: 16 floats a thread
SUMS_TYPE = plgpu.ShapeDtypeStruct(SUMS_SHAPE, jnp.float32, layout=MATRIX)
ROWS_TYPE = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ALONG_ROWS)


def query_layout(words: int) -> plgpu.Layout:
    """Of what `load_query` returns: a word of each thread for every 8 elements."""
    return plgpu.Layout.WG_STRIDED((words,), vec_size=4)


def _warp_max_twin(values):
    by_warp = values.reshape(WARPS, -1)
    return jnp.broadcast_to(jnp.max(by_warp, axis=1, keepdims=True), by_warp.shape).reshape(-1)


@with_twin(_warp_max_twin)
def warp_max(values: Float[Array, "64"]) -> Float[Array, "64"]:
    """The largest of the 16 rows of a warp, in all of these rows; layout ALONG_ROWS."""

    @plgpu.inline_mgpu(arg_types=(ALONG_ROWS,), return_type=ROWS_TYPE)
    def inline(_, values):
        larger = functools.partial(ptx.extreme, "max", "f32")
        word = larger(*(word_of(register) for register in values.registers.flat))
        word = ordered_bits(ptx.over_warp("max", ordered_bits(word)))
        return as_array([ptx.as_float(word)] * 2, (64,), ALONG_ROWS)

    return inline(values)


def _store_query_twin(target, query, dtype, size):
    del size
    target[0] = query


@with_twin(_store_query_twin)
def store_query(target, query: Float[Array, "128"], dtype: jnp.dtype, size: int) -> None:
    """Stores a query in shared memory, in the order and type that keys of a dtype need.

    Args:
      target: float32 [at least 2, 128].
      query: in the layout VECTOR.
      dtype: of the keys: bfloat16 or float16; or uint8, of codes.
      size: elements of the query, of which those from `size` on are copies.
    """
    codes = dtype == jnp.uint8
    number = quantized_fragments.NUMBER if codes else PTX_TYPES[jnp.dtype(dtype).name]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), VECTOR))
    def inline(_, target, query):
        element = ptx.as_float(only_word(query))
        thread = thread_index()
        with ptx.when(ptx.less(thread, size)) if size < WARPGROUP else contextlib.nullcontext():
            float_fragments.store_query(number, ptx.pointer(target, ptx.SHARED), thread, element, codes=codes)

    inline(target, query)


@with_twin(lambda source, size: source[0, :size])
def load_query(source, size: int) -> Array:
    """What `store_query` stored, as the operand of `row_scores`."""

    blocks = size // float_fragments.BLOCK
    words = blocks * WARPGROUP

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((words,), jnp.int32, layout=query_layout(words)),
    )
    def inline(_, source):
        lane, _ = lane_and_warp()
        numbers = float_fragments.load_query(ptx.pointer(source, ptx.SHARED), lane, blocks)
        return as_array(numbers, (words,), query_layout(words), is_signed=True)

    return inline(source)


def _row_scores_twin(keys, query):
    tiles = zip(keys, jnp.split(query, len(keys)), strict=True)
    return sum(jnp.sum(key.astype(jnp.float32) * tile[None], axis=1) for key, tile in tiles)


@with_twin(_row_scores_twin)
def row_scores(keys: Sequence[Float[Array, "64 64"]], query: Array) -> Float[Array, "64"]:
    """keys . query, float32, in the layout ALONG_ROWS.

    Args:
      keys: the tiles of every row, 16-bit floats in the layout MATRIX.
      query: from `load_query`.
    """
    number = PTX_TYPES[jnp.dtype(keys[0].dtype).name]

    @plgpu.inline_mgpu(arg_types=(*[MATRIX] * len(keys), query_layout(query.shape[0])), return_type=ROWS_TYPE)
    def inline(_, *arrays):
        *keys, query = arrays
        tiles = [tuple(map(packed_word, pair)) for key in keys for pair in key.registers.reshape(-1, 2)]
        return as_array(float_fragments.scores(number, tiles, numbers_of(query)), (64,), ALONG_ROWS)

    return inline(*keys, query)


def add_values_twin(
    sums: Sequence[Float[Array, "64 32"]],
    before: Float[Array, "64"],
    values: Sequence[Float[Array, "64 64"]],
    weights: Float[Array, "64"],
) -> tuple[Float[Array, "64 32"], ...]:
    """The twin of `add_values`, for arrays of values. The first two rows of a warp hold its 64 sums."""
    by_warp = weights.reshape(WARPS, 1, -1)
    factor = before.reshape(WARPS, -1)[:, :1, None]
    new = []
    for old, tile in zip(sums, values, strict=True):
        added = (by_warp @ tile.reshape(WARPS, -1, 64)).reshape(WARPS, 2, 32)
        filled = jnp.pad(added, ((0, 0), (0, 14), (0, 0)))
        new.append((old.reshape(filled.shape) * factor + filled).reshape(old.shape))
    return tuple(new)


def _add_values_twin(sums, before, values, weights):
    return add_values_twin(sums, before, [tile[...].astype(jnp.float32) for tile in values], weights)


@with_twin(_add_values_twin)
def add_values(
    sums: Sequence[Float[Array, "64 32"]], before: Float[Array, "64"], values: Sequence, weights: Float[Array, "64"]
) -> tuple[Float[Array, "64 32"], ...]:
    """sums * before + weights . values, for each tile of the values.

    Args:
      sums: for each warp, over its 16 rows, of 64 elements; only `store_context_sums` knows which sum is where.
      before: [rows], equal within a warp.
      values: refs in shared memory, 16-bit floats [64, 64] in the 128-byte swizzle.
      weights: [rows].
    """
    number, tiles = PTX_TYPES[jnp.dtype(values[0].dtype).name], len(values)

    @plgpu.inline_mgpu(
        arg_types=(*[MATRIX] * tiles, ALONG_ROWS, ALONG_ROWS, *[plgpu.RefType((plgpu.SwizzleTransform(128),))] * tiles),
        return_type=(SUMS_TYPE,) * tiles,
    )
    def inline(_, *arrays):
        sums, (before, weights), values = arrays[:tiles], arrays[tiles : tiles + 2], arrays[tiles + 2 :]
        factor = ptx.as_float(word_of(before.registers.flat[0]))
        lane, warp = lane_and_warp()
        two_rows = [ptx.as_float(word_of(register)) for register in weights.registers.flat]
        words = float_fragments.spread_weights(number, two_rows, lane)
        new = []
        for old, tile in zip(sums, values, strict=True):
            numbers = [ptx.multiply(x, factor) for x in numbers_of(old)]
            numbers = float_fragments.add_values(number, ptx.pointer(tile, ptx.SHARED), words, lane, warp, numbers)
            new.append(as_array(numbers, SUMS_SHAPE, MATRIX))
        return tuple(new)

    return inline(*sums, before, weights, *values)


def _store_context_sums_twin(target, warpgroup, sums, weights, *, codes=False):
    for tile, tile_sums in enumerate(sums):
        weighted = tile_sums.reshape(WARPS, 16, 32)[:, :2].reshape(WARPS, 64) * weights.reshape(WARPS, 16)[:, :1]
        for warp in range(WARPS):
            target[warpgroup * WARPS + warp, 64 * tile : 64 * (tile + 1)] = weighted[warp]


@with_twin(_store_context_sums_twin)
def store_context_sums(
    target,
    warpgroup: Int[Array, ""],
    sums: Sequence[Float[Array, "64 32"]],
    weights: Float[Array, "64"],
    *,
    codes: bool = False,
) -> None:
    """Every warp stores its sums of values, times its weight.

    Args:
      target: shared memory, float32 [warps of the block, 128].
      warpgroup: of the calling threads.
      sums: from `add_values`.
      weights: [rows], equal within a warp, in the layout ALONG_ROWS.
      codes: whether the sums are from `quantized_cache.add_values`.
    """
    row_bytes = 4 * target.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, *[MATRIX] * len(sums), ALONG_ROWS))
    def inline(_, target, warpgroup, *arrays):
        *sums, weights = arrays
        weight = ptx.as_float(word_of(weights.registers.flat[0]))
        lane, warp = lane_and_warp()
        row = ptx.plus(ptx.times(scalar_of(warpgroup), WARPS), warp)
        pointer = ptx.advance_far(ptx.pointer(target, ptx.SHARED), row, row_bytes)
        for tile, tile_sums in enumerate(sums):
            tile_pointer = ptx.advance(pointer, 256 * tile)
            float_fragments.store_sums(tile_pointer, numbers_of(tile_sums), weight, lane, codes=codes)

    inline(target, jnp.int32(warpgroup), *sums, weights)
