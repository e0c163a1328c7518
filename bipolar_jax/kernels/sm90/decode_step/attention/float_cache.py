"""What of attention is written for threads, as functions of arrays: scores, sums of values, partial results joined."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import (
    ALONG_ROWS,
    MATRIX,
    SPLAT,
    VECTOR,
    WARPS,
    in_register,
    lane_and_warp,
    numbers_of,
    only_word,
    thread_index,
    word_of,
)
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES, WARPGROUP
from bipolar_jax.kernels.sm90.decode_step.attention import float_cache_threads as threads
from bipolar_jax.kernels.sm90.decode_step.attention import quantized_cache_threads
from bipolar_jax.kernels.sm90.decode_step.exchange import in_order

_QUERY_WORDS = 16 * WARPGROUP
HALF_SUMS = plgpu.ShapeDtypeStruct((64, 32), jnp.float32, layout=MATRIX)
QUERY_LAYOUT = plgpu.Layout.WG_STRIDED((_QUERY_WORDS,), vec_size=4)  # 16 words a thread


def warp_max(values: Float[Array, "64"], *, emulate: bool) -> Float[Array, "64"]:
    """The largest of the 16 rows of a warp, in all of them; layout ALONG_ROWS."""
    if emulate:
        rows = values.reshape(WARPS, -1)
        return jnp.broadcast_to(jnp.max(rows, axis=1, keepdims=True), rows.shape).reshape(-1)

    @plgpu.inline_mgpu(
        arg_types=(ALONG_ROWS,), return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ALONG_ROWS)
    )
    def inline(_, values):
        larger = functools.partial(ptx.extreme, "max", "f32")
        word = larger(*(word_of(register) for register in values.registers.flat))
        word = in_order(ptx.over_warp("max", in_order(word)))
        return along_rows([ptx.as_float(word)] * 2)

    return inline(values)


def share_query(target, query: Float[Array, "128"], dtype: jnp.dtype, *, emulate: bool) -> None:
    """Leaves a query in shared memory, for keys of that dtype.

    Args:
      target: float32 [at least 2, 128].
      query: in the layout VECTOR.
      dtype: bfloat16 or float16; or uint8, of keys as codes.
    """
    codes = dtype == jnp.uint8
    name = quantized_cache_threads.NUMBER if codes else PTX_TYPES[jnp.dtype(dtype).name]
    if emulate:
        target[0] = query
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), VECTOR))
    def inline(_, target, query):
        number = ptx.as_float(only_word(query))
        threads.store_query(name, ptx.pointer(target, ptx.SHARED), thread_index(), number, codes=codes)

    inline(target, query)


def load_query(source, *, emulate: bool) -> Array:
    """What `share_query` left, for `row_scores`."""
    if emulate:
        return source[0]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((_QUERY_WORDS,), jnp.int32, layout=QUERY_LAYOUT),
    )
    def inline(_, source):
        lane, _ = lane_and_warp()
        words = threads.load_query(ptx.pointer(source, ptx.SHARED), lane)
        layout = QUERY_LAYOUT.to_mgpu()
        registers = np.empty(layout.registers_shape((_QUERY_WORDS,)), dtype=object)
        registers.flat = [in_register(*words[i : i + 4]) for i in range(0, len(words), 4)]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return inline(source)


def row_scores(keys: Sequence[Float[Array, "64 64"]], query: Array, *, emulate: bool) -> Float[Array, "64"]:
    """keys . query, float32, in the layout ALONG_ROWS.

    Args:
      keys: both halves of every row, 16-bit floats in the layout MATRIX.
      query: of `load_query`.
    """
    if emulate:
        return sum(
            jnp.sum(key.astype(jnp.float32) * part, axis=1) for key, part in zip(keys, jnp.split(query, 2), strict=True)
        )
    number = PTX_TYPES[jnp.dtype(keys[0].dtype).name]

    @plgpu.inline_mgpu(
        arg_types=(*[MATRIX] * len(keys), QUERY_LAYOUT),
        return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ALONG_ROWS),
    )
    def inline(_, *arrays):
        *keys, query = arrays
        blocks = [tuple(map(_two_halves, pair)) for key in keys for pair in key.registers.reshape(-1, 2)]
        return along_rows(threads.scores(number, blocks, numbers_of(query)))

    return inline(*keys, query)


def add_values(
    sums: Sequence[Float[Array, "64 32"]],
    before: Float[Array, "64"],
    values: Sequence,
    weights: Float[Array, "64"],
    *,
    emulate: bool,
) -> tuple[Float[Array, "64 32"], ...]:
    """sums * before + weights . values, for both halves of the values.

    Args:
      sums: of the 16 rows of every warp and 64 numbers; which element is where is known to `share_columns` alone.
      before: of the rows, alike within a warp.
      values: refs in shared memory, 16-bit floats [64, 64] in the 128-byte swizzle.
      weights: of the rows.
    """
    if emulate:
        return emulated_sums(sums, before, [half[...].astype(jnp.float32) for half in values], weights)
    number = PTX_TYPES[jnp.dtype(values[0].dtype).name]

    @plgpu.inline_mgpu(
        arg_types=(*[MATRIX] * 2, ALONG_ROWS, ALONG_ROWS, *[plgpu.RefType((plgpu.SwizzleTransform(128),))] * 2),
        return_type=(HALF_SUMS, HALF_SUMS),
    )
    def inline(_, *arrays):
        sums, (before, weights), values = arrays[:2], arrays[2:4], arrays[4:]
        factor = ptx.as_float(word_of(before.registers.flat[0]))
        lane, warp = lane_and_warp()
        both = [ptx.as_float(word_of(register)) for register in weights.registers.flat]
        words = threads.spread_weights(number, both, lane)
        new = []
        for old, half in zip(sums, values, strict=True):
            numbers = [ptx.multiply(x, factor) for x in numbers_of(old)]
            numbers = threads.add_values(number, ptx.pointer(half, ptx.SHARED), words, lane, warp, numbers)
            new.append(half_of_sums(numbers))
        return tuple(new)

    return inline(*sums, before, weights, *values)


def emulated_sums(
    sums: Sequence[Float[Array, "64 32"]],
    before: Float[Array, "64"],
    values: Sequence[Float[Array, "64 64"]],
    weights: Float[Array, "64"],
) -> tuple[Float[Array, "64 32"], ...]:
    """`add_values` in interpret mode: a warp's 64 sums are in the first two of its rows."""
    by_warp = weights.reshape(WARPS, 1, -1)
    factor = before.reshape(WARPS, -1)[:, :1, None]
    new = []
    for old, half in zip(sums, values, strict=True):
        added = (by_warp @ half.reshape(WARPS, -1, 64)).reshape(WARPS, 2, 32)
        filled = jnp.pad(added, ((0, 0), (0, 14), (0, 0)))
        new.append((old.reshape(filled.shape) * factor + filled).reshape(old.shape))
    return tuple(new)


def share_columns(
    exchange,
    warpgroup: Int[Array, ""],
    sums: Sequence[Float[Array, "64 32"]],
    weights: Float[Array, "64"],
    *,
    codes: bool = False,
    emulate: bool,
) -> None:
    """Every warp leaves its sums, weighted.

    Args:
      exchange: float32 in shared memory, [warps of the block, 128].
      warpgroup: which this is.
      sums: of `add_values`.
      weights: of the rows, alike within a warp, in the layout ALONG_ROWS.
      codes: whether the sums are `code_rows.add_values`'.
    """
    if emulate:
        for half, part in enumerate(sums):
            whole = part.reshape(WARPS, 16, 32)[:, :2].reshape(WARPS, 64) * weights.reshape(WARPS, 16)[:, :1]
            for warp in range(WARPS):
                exchange[warpgroup * WARPS + warp, 64 * half : 64 * (half + 1)] = whole[warp]
        return
    stride = 4 * exchange.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, *[MATRIX] * 2, ALONG_ROWS))
    def inline(_, exchange, warpgroup, *arrays):
        *sums, weights = arrays
        weight = ptx.as_float(word_of(weights.registers.flat[0]))
        lane, warp = lane_and_warp()
        row = ptx.plus(ptx.times(warpgroup.registers.item(), WARPS), warp)
        target = ptx.advance_far(ptx.pointer(exchange, ptx.SHARED), row, stride)
        for half, part in enumerate(sums):
            threads.leave_sums(ptx.advance(target, 256 * half), numbers_of(part), weight, lane, codes=codes)

    inline(exchange, jnp.int32(warpgroup), *sums, weights)


def half_of_sums(numbers: Sequence[ir.Value]) -> mgpu.FragmentedArray:
    """The array of a thread's 16 sums."""
    layout = MATRIX.to_mgpu()
    registers = np.empty(layout.registers_shape((64, 32)), dtype=object)
    registers.flat = [in_register(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _two_halves(register: ir.Value) -> ir.Value:
    """A register of two 16-bit floats, as a word."""
    return llvm.bitcast(ptx.i32_type(), register)


def along_rows(numbers: Sequence[ir.Value]) -> mgpu.FragmentedArray:
    """The array of a thread's two rows."""
    layout = ALONG_ROWS.to_mgpu()
    registers = np.empty(layout.registers_shape((64,)), dtype=object)
    registers.flat = [in_register(number) for number in numbers]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
