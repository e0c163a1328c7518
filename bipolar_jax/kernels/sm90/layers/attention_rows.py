"""What of attention is written for threads: pairs of rows, sums over rows, partial results put together."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.layers.marks import await_words, checked
from bipolar_jax.kernels.sm90.layers.registers import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    MATRIX,
    SPLAT,
    VECTOR,
    WARPS,
    as_vector,
    element,
    in_register,
    lane_and_warp,
    thread_index,
    word_of,
)
from bipolar_jax.kernels.sm90.row_threads import WARPGROUP, tree

_NUMBERS = {"bfloat16": "bf16", "float16": "f16"}


def pairwise_max(values: Float[Array, "64"], *, emulate: bool) -> Float[Array, "64"]:
    """The larger of the two rows that a thread has, for both: rows r and r + 8 of every 16; layout ALONG_ROWS."""
    if emulate:
        pairs = values.reshape(4, 2, 8)
        return jnp.broadcast_to(jnp.max(pairs, axis=1, keepdims=True), pairs.shape).reshape(64)

    @plgpu.inline_mgpu(
        arg_types=(ALONG_ROWS,), return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ALONG_ROWS)
    )
    def inline(_, values):
        larger = functools.partial(gpu.extreme, "max", "f32")
        word = larger(*(word_of(register) for register in values.registers.flat))
        registers = np.empty_like(values.registers)
        registers.flat = [in_register(gpu.as_float(word))] * 2
        return mgpu.FragmentedArray(_registers=registers, _layout=values.layout, _is_signed=None)

    return inline(values)


def row_scores(
    keys: Sequence[Float[Array, "64 64"]], query: Sequence[Float[Array, "64"]], *, emulate: bool
) -> Float[Array, "64"]:
    """sum of keys * query over columns of all matrices, float32, in the layout ALONG_ROWS.

    Args:
      keys: 16-bit floats in the layout MATRIX.
      query: float32, a vector for each matrix, in the layout ALONG_COLUMNS.
    """
    if emulate:
        return sum(jnp.sum(key.astype(jnp.float32) * part, axis=1) for key, part in zip(keys, query, strict=True))
    number = _NUMBERS[jnp.dtype(keys[0].dtype).name]

    @plgpu.inline_mgpu(
        arg_types=(*[MATRIX] * len(keys), *[ALONG_COLUMNS] * len(query)),
        return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ALONG_ROWS),
    )
    def inline(_, *arrays):
        totals = [gpu.float32(0)] * 2
        for key, part in zip(arrays[: len(keys)], arrays[len(keys) :], strict=True):
            for halves, pair in zip(key.registers.reshape(-1, 2), part.registers.flat, strict=True):
                for half, register in enumerate(halves):
                    for column, x in enumerate(gpu.expand(number, _two_halves(register))):
                        totals[half] = gpu.fma(x, element(pair, column), totals[half])
        # Lanes that have the other columns of the same row are 1 and 2 apart.
        for distance in (1, 2):
            totals = [gpu.add(t, gpu.as_float(gpu.exchange(gpu.as_word(t), distance))) for t in totals]
        layout = ALONG_ROWS.to_mgpu()
        registers = np.empty(layout.registers_shape((64,)), dtype=object)
        registers.flat = [in_register(total) for total in totals]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return inline(*keys, *query)


def add_pairs(
    sums: Float[Array, "64 32"],
    before: Float[Array, "64"],
    matrix: Float[Array, "64 64"],
    weights: Float[Array, "64"],
    *,
    emulate: bool,
) -> Float[Array, "64 32"]:
    """sums * before + matrix * weights, the two rows of a thread added up: half the registers of a matrix.

    Args:
      sums: of 32 pairs of rows and 64 columns; which element is where is known to `share_columns` alone.
      before: of the rows, alike for a pair.
      matrix, weights: what is added, 16-bit floats, and the weights of its rows.
    """
    number = _NUMBERS[jnp.dtype(matrix.dtype).name]
    if emulate:
        pairs = (matrix.astype(jnp.float32) * weights[:, None]).reshape(4, 2, 8, 64).sum(1).reshape(32, 64)
        return (sums.reshape(32, 64) * before.reshape(4, 2, 8)[:, 0].reshape(32, 1) + pairs).reshape(64, 32)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, ALONG_ROWS, MATRIX, ALONG_ROWS),
        return_type=plgpu.ShapeDtypeStruct((64, 32), jnp.float32, layout=MATRIX),
    )
    def inline(_, sums, before, matrix, weights):
        factor = gpu.as_float(word_of(before.registers.flat[0]))
        weights = [gpu.as_float(word_of(register)) for register in weights.registers.flat]
        registers = np.empty_like(sums.registers)
        new = []
        for old, halves in zip(sums.registers.flat, matrix.registers.reshape(-1, 2), strict=True):
            totals = [gpu.multiply(element(old, column), factor) for column in range(2)]
            for half, weight in zip(halves, weights, strict=True):
                pair = gpu.expand(number, _two_halves(half))
                totals = [gpu.fma(x, weight, total) for x, total in zip(pair, totals, strict=True)]
            new.append(in_register(*totals))
        registers.flat = new
        return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)

    return inline(sums, before, matrix, weights)


def share_columns(
    exchange,
    warpgroup: Int[Array, ""],
    sums: Float[Array, "64 32"],
    weights: Float[Array, "64"],
    first: int,
    *,
    emulate: bool,
) -> None:
    """Every warp leaves the weighted sums over its rows of what `add_pairs` summed.

    Args:
      exchange: float32 in shared memory, [warps of the block, columns].
      warpgroup: which this is.
      sums: of pairs of rows and 64 columns.
      weights: of the rows, alike for a pair, in the layout ALONG_ROWS.
      first: where in the exchange's columns these begin.
    """
    if emulate:
        whole = jnp.sum(sums.reshape(32, 64) * weights.reshape(4, 2, 8)[:, 0].reshape(32, 1), axis=0)
        for warp in range(WARPS):
            exchange[warpgroup * WARPS + warp, first : first + 64] = whole if warp == 0 else jnp.zeros_like(whole)
        return
    stride = 4 * exchange.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, MATRIX, ALONG_ROWS))
    def inline(_, exchange, warpgroup, sums, weights):
        weight = gpu.as_float(word_of(weights.registers.flat[0]))
        lane, warp = lane_and_warp()
        row = gpu.plus(gpu.times(warpgroup.registers.item(), WARPS), warp)
        target = gpu.advance_far(gpu.pointer(exchange, gpu.SHARED), row, stride)
        target = gpu.advance(gpu.advance_far(target, gpu.bits_of(lane, 3), 8), 4 * first)
        # Of every 8 columns a thread has two; the 8 lanes that have the same two of other rows are 4 apart. Each
        # time half of what is left goes to the lane that differs in a bit, until a lane has two columns alone.
        numbers = [element(register, i) for register in sums.registers.flat for i in range(2)]
        numbers = [gpu.as_word(gpu.multiply(number, weight)) for number in numbers]
        for distance in (16, 8, 4):
            upper = gpu.less(0, gpu.bits_of(lane, distance))
            halves = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
            pairs = list(zip(*halves, strict=True))
            kept = [gpu.choose(upper, b, a) for a, b in pairs]
            given = [gpu.exchange(gpu.choose(upper, a, b), distance) for a, b in pairs]
            numbers = [gpu.as_word(gpu.add(*map(gpu.as_float, pair))) for pair in zip(kept, given, strict=True)]
        block = gpu.shift_right(lane, 2)
        gpu.store(gpu.advance_far(target, block, 32), numbers)

    inline(exchange, jnp.int32(warpgroup), sums, weights)


def await_joined(
    partials,
    head: Int[Array, ""],
    records: int,
    size: int,
    start: Int[Array, ""],
    count: int,
    mark: Int[Array, ""],
    needed: Int[Array, ""],
    *,
    emulate: bool,
) -> Float[Array, "128"]:
    """Some numbers of a head's attention, put together from partial ones that other blocks leave.

    Args:
      partials: flat float32 in memory, `size` numbers each: the 128 of a sum of values, then, time and again, the
        largest score m (base 2) and the sum l of weights.
      head: whose.
      records: partial ones of a head.
      size: of a partial one.
      start: of the wanted numbers, a multiple of 32.
      count: of the wanted numbers, a power of two of at least 32.
      mark: of the numbers.
      needed: 1 to wait for them, or 0.

    Returns:
      sum_r 2^(m_r - M) values_r / sum_r 2^(m_r - M) l_r with M the largest m; again and again if count is not 128.
    """
    if emulate:
        every = checked(partials[...], mark).reshape(-1, records, size)[head]
        largest, total = every[:, 128], every[:, 129]
        weights = jnp.exp2(largest - jnp.max(largest))
        sums = jnp.sum(every[:, :128] * weights[:, None], axis=0)
        return (sums / jnp.sum(total * weights))[start + lax.iota(jnp.int32, WARPGROUP) % count]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * 4),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
    )
    def inline(_, partials, head, start, mark, needed):
        within = gpu.plus(start.registers.item(), gpu.bits_of(thread_index(), count - 1))
        base = gpu.pointer(partials, gpu.GLOBAL)
        base = gpu.advance_far(base, gpu.times(head.registers.item(), records * size), 4)
        places = []
        for record in range(records):
            place = gpu.advance(base, 4 * size * record)
            places += [(gpu.advance(place, 4 * 128), 2), (gpu.advance_far(place, within, 4), 1)]
        words = await_words(places, mark.registers.item(), needed.registers.item())
        largest, totals = zip(*(map(gpu.as_float, pair) for pair in words[::2]), strict=True)
        values = [gpu.as_float(word) for (word,) in words[1::2]]
        most = tree(functools.partial(gpu.extreme, "max", "f32"), [gpu.as_word(number) for number in largest])
        minus_most = gpu.multiply(gpu.as_float(most), gpu.float32(-1))
        weights = [gpu.exp2(gpu.add(number, minus_most)) for number in largest]
        whole, total = (
            tree(gpu.add, [gpu.multiply(*pair) for pair in zip(some, weights, strict=True)])
            for some in (values, totals)
        )
        return as_vector(gpu.divide(whole, total), jnp.float32)

    return inline(partials, *(jnp.int32(number) for number in (head, start, mark, needed)))


def _two_halves(register: ir.Value) -> ir.Value:
    """A register of two 16-bit floats, as a word."""
    return llvm.bitcast(gpu.i32_type(), register)
