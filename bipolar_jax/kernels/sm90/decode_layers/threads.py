"""What the fused layers need of single threads: vectors of 128 numbers, one a thread, and what passes between warps.

Mosaic's own loads and reductions know neither the end of an array nor that several warpgroups share a block. Each
function has a twin in jnp for interpret mode, chosen by `emulate`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.row_threads import WARP, WARPGROUP, tree
from bipolar_jax.kernels.sm90.tensor_core import ACCUMULATOR, TILE_TRANSFORMS

WARPS = WARPGROUP // WARP
VECTOR = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)  # element i belongs to thread i
PART_ELEMENTS = 8 * WARPGROUP
PART = plgpu.Layout.WG_STRIDED((PART_ELEMENTS,), vec_size=8)  # elements 8 i ... belong to thread i
MATRIX = plgpu.Layout.WGMMA
ALONG_ROWS, ALONG_COLUMNS = MATRIX.reduce(1), MATRIX.reduce(0)
_STORED = 32  # numbers, at least, where vectors are stored
_BLOCK_WARPS = 16
_SPLAT = plgpu.Layout.WG_SPLAT
# Threads that hold each element of a vector in these layouts.
_COPIES = {VECTOR: 1, PART: 1, ALONG_ROWS: 4}


def pinned(number: Int[Array, ""], *, emulate: bool) -> Int[Array, ""]:
    """The same number, of which the compiler knows nothing.

    What is computed from it stays in the loop where it is: addresses by the dozen, the same for every layer, would
    be computed once before it, and spilled.
    """
    if emulate:
        return number

    @plgpu.inline_mgpu(arg_types=(_SPLAT,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SPLAT))
    def inline(_, number):
        return _splat(gpu.opaque(number.registers.item()), True)

    return inline(jnp.int32(number))


def load_vector(ref, start: Int[Array, ""], end: Int[Array, ""] | int, *, turned: int = 0, emulate: bool) -> Array:
    """ref[start : start + 128] of a flat array in memory, 0 from `end` on: float32, or int32 of integers.

    The array has 4 bytes a number, or is bfloat16. With `turned` element i is that of (i + turned) mod 128.
    """
    integers, size = jnp.issubdtype(ref.dtype, jnp.integer), jnp.dtype(ref.dtype).itemsize
    dtype = jnp.int32 if integers else jnp.float32
    if ref.dtype != jnp.bfloat16 and size != 4:
        raise ValueError(f"vectors are loaded of bfloat16 or of 4 bytes a number, not of {ref.dtype}")
    if emulate:
        index = start + (lax.iota(jnp.int32, WARPGROUP) + turned) % WARPGROUP
        return jnp.where(index < end, ref[...][jnp.where(index < end, index, 0)].astype(dtype), 0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SPLAT, _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), dtype, layout=VECTOR),
    )
    def inline(_, ref, start, end):
        element = gpu.bits_of(gpu.plus(_thread(), turned), WARPGROUP - 1) if turned else _thread()
        index = gpu.plus(start.registers.item(), element)
        valid = gpu.less(index, end.registers.item())
        where = gpu.advance_far(gpu.pointer(ref, gpu.GLOBAL), gpu.choose(valid, index, gpu.int32(0)), size)
        word = gpu.shift_left(gpu.load_half(where), 16) if size == 2 else gpu.load(where, 1)[0]
        word = gpu.choose(valid, word, gpu.int32(0))
        return _vector(word if integers else gpu.as_float(word), dtype)

    return inline(ref, jnp.int32(start), jnp.int32(end))


def store_vector(ref, values: Array, start: Int[Array, ""], count: Int[Array, ""] | int, *, emulate: bool) -> None:
    """ref[start : start + count] = values[:count], of a flat array in memory of 4 bytes a number.

    The count is a multiple of 32.
    """
    if emulate:
        for i in range(0, WARPGROUP, _STORED):

            @pl.when(i < count)
            def _(i=i):
                ref[pl.ds(start + i, _STORED)] = values[i : i + _STORED]

        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), VECTOR, _SPLAT, _SPLAT))
    def inline(_, ref, values, start, count):
        thread = _thread()
        with gpu.when(gpu.less(thread, count.registers.item())):
            index = gpu.plus(start.registers.item(), thread)
            gpu.store(gpu.advance_far(gpu.pointer(ref, gpu.GLOBAL), index, 4), [_word(values)])

    inline(ref, values, jnp.int32(start), jnp.int32(count))


def load_part(ref, start: Int[Array, ""], end: Int[Array, ""] | int, *, emulate: bool) -> Float[Array, "1024"]:
    """ref[start : start + 1024] of a flat float32 or bfloat16 array in memory, 0 from `end` on: float32.

    Start and end are multiples of 8.
    """
    size = jnp.dtype(ref.dtype).itemsize
    if ref.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"parts are loaded of bfloat16 or float32, not of {ref.dtype}")
    if emulate:
        index = start + lax.iota(jnp.int32, PART_ELEMENTS)
        return jnp.where(index < end, ref[...][jnp.where(index < end, index, 0)].astype(jnp.float32), 0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SPLAT, _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((PART_ELEMENTS,), jnp.float32, layout=PART),
    )
    def inline(_, ref, start, end):
        index = gpu.plus(start.registers.item(), gpu.times(_thread(), 8))
        valid = gpu.less(index, end.registers.item())
        where = gpu.advance_far(gpu.pointer(ref, gpu.GLOBAL), gpu.choose(valid, index, gpu.int32(0)), size)
        if size == 2:
            numbers = [number for word in gpu.load(where, 4) for number in gpu.expand("bf16", word)]
        else:
            numbers = [gpu.as_float(word) for i in range(2) for word in gpu.load(gpu.advance(where, 16 * i), 4)]
        return _part([gpu.choose(valid, number, gpu.float32(0)) for number in numbers])

    return inline(ref, jnp.int32(start), jnp.int32(end))


def load_attended(partials, start: Int[Array, ""], heads: int, records: int, size: int, *, emulate: bool):
    """A part of the heads' attention, each put together from `records` partial ones; 0 where there are no more heads.

    Args:
      partials: flat float32 in memory, `size` numbers each: the 128 of a sum of values, then 32 times the largest
        score m (base 2), then 32 times the sum l of weights.
      start: of the part, in elements of all heads.
      heads: how many.
      records: partial ones of a head.
      size: of a partial one.

    Returns:
      float32 [1024], sum_r 2^(m_r - M) values_r / sum_r 2^(m_r - M) l_r with M the largest m.
    """
    if emulate:
        every = partials[...].reshape(-1, size)[: heads * records].reshape(heads, records, size)
        largest, total = every[..., 128], every[..., 160]
        weights = jnp.exp2(largest - jnp.max(largest, axis=1, keepdims=True))
        sums = jnp.sum(every[..., :128] * weights[..., None], axis=1)
        whole = (sums / jnp.sum(total * weights, axis=1, keepdims=True)).reshape(-1)
        index = start + lax.iota(jnp.int32, PART_ELEMENTS)
        return jnp.where(index < whole.size, whole[jnp.where(index < whole.size, index, 0)], 0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((PART_ELEMENTS,), jnp.float32, layout=PART),
    )
    def inline(_, partials, start):
        index = gpu.plus(start.registers.item(), gpu.times(_thread(), 8))
        head, within = gpu.shift_right(index, 7), gpu.bits_of(index, 127)
        valid = gpu.less(head, heads)
        head = gpu.choose(valid, head, gpu.int32(0))
        base = gpu.advance_far(gpu.pointer(partials, gpu.GLOBAL), gpu.times(head, records * size), 4)
        places = [gpu.advance(base, 4 * size * record) for record in range(records)]
        largest, totals = (
            [gpu.as_float(gpu.load(gpu.advance(place, 4 * offset), 1)[0]) for place in places] for offset in (128, 160)
        )
        most = tree(functools.partial(gpu.extreme, "max", "f32"), [gpu.as_word(number) for number in largest])
        minus_most = gpu.multiply(gpu.as_float(most), gpu.float32(-1))
        weights = [gpu.exp2(gpu.add(number, minus_most)) for number in largest]
        whole = tree(gpu.add, [gpu.multiply(*pair) for pair in zip(totals, weights, strict=True)])
        scale = gpu.choose(valid, gpu.divide(gpu.float32(1), whole), gpu.float32(0))
        sums = [gpu.float32(0)] * 8
        for place, weight in zip(places, weights, strict=True):
            where = gpu.advance_far(place, within, 4)
            words = [word for i in range(2) for word in gpu.load(gpu.advance(where, 16 * i), 4)]
            sums = [gpu.fma(gpu.as_float(w), weight, s) for w, s in zip(words, sums, strict=True)]
        return _part([gpu.multiply(number, scale) for number in sums])

    return inline(partials, jnp.int32(start))


def share(
    exchange,
    warpgroup: Int[Array, ""],
    values: Sequence[Float[Array, " n"]],
    kind: Literal["sum", "max", "min"],
    layout: plgpu.Layout = PART,
    *,
    emulate: bool,
) -> None:
    """Every warp leaves the sum or an extreme of its part of some arrays in shared memory; `collect` reads them.

    Args:
      exchange: float32 [warps of the block].
      warpgroup: which this is.
      values: arrays in the layout VECTOR, PART or ALONG_ROWS.
      kind: what is made of them; NaN of an extreme stays.
      layout: of the values.
    """
    if emulate:
        reduce = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}[kind]
        reduced = reduce(jnp.stack(values))
        for warp in range(WARPS):
            exchange[warpgroup * WARPS + warp] = reduced if kind != "sum" or warp == 0 else jnp.float32(0)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, *[layout] * len(values)))
    def inline(_, exchange, warpgroup, *values):
        numbers = [number for array in values for number in _numbers(array)]
        if kind == "sum":
            number = tree(gpu.add, numbers)
            for distance in (1, 2, 4, 8, 16):
                number = gpu.add(number, gpu.as_float(gpu.exchange(gpu.as_word(number), distance)))
            word = gpu.as_word(gpu.multiply(number, gpu.float32(1 / _COPIES[layout])))
        else:
            extreme = tree(functools.partial(gpu.extreme, kind, "f32"), [gpu.as_word(number) for number in numbers])
            word = _in_order(gpu.over_warp(kind, _in_order(extreme)))
        lane, warp = _lane_and_warp()
        with gpu.when(gpu.equal(lane, 0)):
            index = gpu.plus(gpu.times(warpgroup.registers.item(), WARPS), warp)
            gpu.store(gpu.advance_far(gpu.pointer(exchange, gpu.SHARED), index, 4), [word])

    inline(exchange, jnp.int32(warpgroup), *values)


def collect(exchange, kind: Literal["sum", "max", "min"], *, emulate: bool) -> Array:
    """The sum or an extreme of what the 16 warps of a block left; float32, or the sum of int32."""
    integers = exchange.dtype == jnp.int32
    if emulate:
        return {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}[kind](exchange[...])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), exchange.dtype, layout=_SPLAT)
    )
    def inline(_, exchange):
        lane, _ = _lane_and_warp()
        index = gpu.bits_of(lane, _BLOCK_WARPS - 1)
        (word,) = gpu.load(gpu.advance_far(gpu.pointer(exchange, gpu.SHARED), index, 4), 1)
        if kind != "sum":
            return _splat(gpu.as_float(_in_order(gpu.over_warp(kind, _in_order(word)))), None)
        if integers:  # both halves of the warp have all of them
            return _splat(gpu.shift_right_signed(gpu.over_warp("add", word), 1), True)
        number = gpu.as_float(word)
        for distance in (1, 2, 4, 8):
            number = gpu.add(number, gpu.as_float(gpu.exchange(gpu.as_word(number), distance)))
        return _splat(number, None)

    return inline(exchange)


def _in_order(word: ir.Value) -> ir.Value:
    """A float's word as an integer of the same order, and back; NaN beyond the infinities."""
    return gpu.flip_bits(word, gpu.bits_of(gpu.shift_right_signed(word, 31), 0x7FFFFFFF))


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
        word = larger(*(_scalar(register) for register in values.registers.flat))
        registers = np.empty_like(values.registers)
        registers.flat = [_in_vector(gpu.as_float(word))] * 2
        return mgpu.FragmentedArray(_registers=registers, _layout=values.layout, _is_signed=None)

    return inline(values)


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
      matrix, weights: what is added, and the weights of its rows.
    """
    if emulate:
        pairs = (matrix * weights[:, None]).reshape(4, 2, 8, 64).sum(1).reshape(32, 64)
        return (sums.reshape(32, 64) * before.reshape(4, 2, 8)[:, 0].reshape(32, 1) + pairs).reshape(64, 32)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, ALONG_ROWS, MATRIX, ALONG_ROWS),
        return_type=plgpu.ShapeDtypeStruct((64, 32), jnp.float32, layout=MATRIX),
    )
    def inline(_, sums, before, matrix, weights):
        factor = gpu.as_float(_scalar(before.registers.flat[0]))
        weights = [gpu.as_float(_scalar(register)) for register in weights.registers.flat]
        registers = np.empty_like(sums.registers)
        new = []
        for old, halves in zip(sums.registers.flat, matrix.registers.reshape(-1, 2), strict=True):
            numbers = []
            for column in range(2):
                total = gpu.multiply(_element(old, column), factor)
                for half, weight in zip(halves, weights, strict=True):
                    total = gpu.fma(_element(half, column), weight, total)
                numbers.append(total)
            new.append(_in_vector(*numbers))
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

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, MATRIX, ALONG_ROWS))
    def inline(_, exchange, warpgroup, sums, weights):
        weight = gpu.as_float(_scalar(weights.registers.flat[0]))
        lane, warp = _lane_and_warp()
        row = gpu.plus(gpu.times(warpgroup.registers.item(), WARPS), warp)
        target = gpu.advance_far(gpu.pointer(exchange, gpu.SHARED), row, stride)
        target = gpu.advance(gpu.advance_far(target, gpu.bits_of(lane, 3), 8), 4 * first)
        # Of every 8 columns a thread has two; the 8 lanes that have the same two of other rows are 4 apart. Each
        # time half of what is left goes to the lane that differs in a bit, until a lane has two columns alone.
        numbers = [_element(register, i) for register in sums.registers.flat for i in range(2)]
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


def pack(
    tiles: Sequence[Any],
    sums,
    warpgroup: Int[Array, ""],
    parts: Sequence[Float[Array, "1024"]],
    starts: Sequence[Int[Array, ""]],
    k: int,
    half_steps: Float[Array, ""],
    middle: Float[Array, ""],
    a_format: BipolarFormat,
    *,
    emulate: bool,
) -> None:
    """Encodes numbers, writes their bit planes as rows of tiles, and leaves every warp's sum of codes.

    The code of x is floor(x * half_steps + 1/2) + middle, without the half for one bit, clipped; none from k on.

    Args:
      tiles: for each part, shared memory, uint32 [8, 32] with TILE_TRANSFORMS; plane i is row i.
      sums: int32 [warps of the block].
      warpgroup: which this is.
      parts: numbers.
      starts: where in K the parts begin.
      k: the contracted size, a multiple of 8.
      half_steps: 1 / (2 scale).
      middle: the code of zero; 1 of one bit.
      a_format: 1 to 8 bits.
    """
    half, bits, top = 0.0 if a_format.bits == 1 else 0.5, a_format.bits, float(a_format.max_value)
    if emulate:
        total = jnp.int32(0)
        for tile, part, start in zip(tiles, parts, starts, strict=True):
            codes = jnp.clip(jnp.floor(part * half_steps + half) + middle, 0.0, top).astype(jnp.int32)
            codes = jnp.where(start + lax.iota(jnp.int32, PART_ELEMENTS) < k, codes, 0)
            for plane in range(bits):
                by_word = ((codes >> plane) & 1).astype(jnp.uint32).reshape(-1, 32)
                tile[plane] = jnp.sum(by_word << lax.iota(jnp.uint32, 32), axis=1, dtype=jnp.uint32)
            total += jnp.sum(codes)
        for warp in range(WARPS):
            sums[warpgroup * WARPS + warp] = total if warp == 0 else jnp.int32(0)
        return
    count = len(parts)
    types = [plgpu.RefType(), _SPLAT, _SPLAT, _SPLAT]
    types += [plgpu.RefType(TILE_TRANSFORMS)] * count + [PART] * count + [_SPLAT] * count

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def inline(_, sums, warpgroup, half_steps, middle, *arrays):
        thread, total = _thread(), gpu.int32(0)
        # Added to 2^23 a number's fraction falls off, and what is left is in the low bits.
        magic = float(1 << 23)
        base = gpu.add(middle.registers.item(), gpu.float32(magic))
        factor = half_steps.registers.item()

        def encode(number):
            steps = gpu.fma(number, factor, gpu.float32(half))
            return gpu.as_word(gpu.at_least(gpu.at_most(gpu.add_down(steps, base), magic + top), magic))

        for tile, part, start in zip(arrays[:count], arrays[count : 2 * count], arrays[2 * count :], strict=True):
            codes = [encode(number) for number in _numbers(part)]
            inside = gpu.less(gpu.plus(start.registers.item(), gpu.times(thread, 8)), k)
            words = [gpu.choose(inside, _low_bytes(codes[i : i + 4]), gpu.int32(0)) for i in (0, 4)]
            for word in words:
                total = gpu.add_bytes(word, total, signed=False)
            where = gpu.pointer(tile, gpu.SHARED)
            planes = _transposed_bytes(*words)
            for plane in range(bits):
                # Byte `thread` of the row; the swizzle exchanges a row's pieces of 16 bytes.
                byte = gpu.plus(gpu.flip_bits(thread, plane << 4), 128 * plane)
                word = gpu.shift_right(planes[plane // 4], 8 * (plane % 4))
                gpu.store_byte(gpu.advance(where, byte), word)
        total = gpu.over_warp("add", total)
        lane, warp = _lane_and_warp()
        with gpu.when(gpu.equal(lane, 0)):
            index = gpu.plus(gpu.times(warpgroup.registers.item(), WARPS), warp)
            gpu.store(gpu.advance_far(gpu.pointer(sums, gpu.SHARED), index, 4), [total])

    inline(sums, jnp.int32(warpgroup), half_steps, middle, *tiles, *parts, *map(jnp.int32, starts))


def _low_bytes(words: Sequence[ir.Value]) -> ir.Value:
    """The low bytes of four words."""
    pairs = [gpu.pick_bytes(a, b, 0x0040) for a, b in (words[:2], words[2:])]
    return gpu.pick_bytes(*pairs, 0x5410)


def _transposed_bytes(low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Eight bytes as a matrix of bits, transposed: bit i of byte p is bit p of byte i.

    Blocks of 1, of 2 and of 4 bits off the diagonal are exchanged; source: Hacker's Delight, section 7-3.
    """

    def exchanged(word, distance, mask):
        differ = gpu.bits_of(gpu.flip_bits(word, gpu.shift_right(word, distance)), mask)
        return gpu.flip_bits(word, gpu.flip_bits(differ, gpu.shift_left(differ, distance)))

    low, high = (exchanged(exchanged(word, 7, 0x00AA00AA), 14, 0x0000CCCC) for word in (low, high))
    differ = gpu.bits_of(gpu.flip_bits(low, gpu.shift_left(high, 4)), 0xF0F0F0F0)
    return gpu.flip_bits(low, differ), gpu.flip_bits(high, gpu.shift_right(differ, 4))


def write_products(
    target,
    accs: Sequence[Int[Array, "rows 8"]],
    w_weights: Sequence[int],
    x_weights: Sequence[int],
    start: Int[Array, ""],
    *,
    emulate: bool,
) -> None:
    """target[start + r] = sum over planes p of w and q of x of their weights and acc[p, r, q], for 32 rows.

    Args:
      target: int32 in shared memory, flat.
      accs: accumulators [64 * planes, 8] in the layout ACCUMULATOR; of the 64 rows of a plane 32 count.
      w_weights: of all planes of w, in the accumulators' order.
      x_weights: of the planes of x, at most 8; what the other columns hold does not matter.
      start: in the target.
    """
    columns = [*x_weights, *[0] * (8 - len(x_weights))]
    if emulate:
        blocks = jnp.concatenate([acc.reshape(-1, 64, 8)[:, :32] for acc in accs])
        by_plane = sum(blocks[:, :, q] * weight for q, weight in enumerate(columns) if weight)
        target[pl.ds(start, 32)] = sum(by_plane[p] * weight for p, weight in enumerate(w_weights))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, *[ACCUMULATOR] * len(accs)))
    def inline(_, target, start, *accs):
        lane, warp = _lane_and_warp()
        pair = gpu.bits_of(lane, 3)
        # Of a plane a thread has columns 2 pair and 2 pair + 1 of rows lane / 4 and lane / 4 + 8 of its warp's 16.
        weights = [_pick(pair, columns[i::2]) for i in range(2)]
        totals = [gpu.int32(0)] * 2
        planes = [plane for acc in accs for plane in acc.registers.reshape(-1, 2, 2)]
        for weight, plane in zip(w_weights, planes, strict=True):
            for half in range(2):
                products = [gpu.times(_scalar(number), w) for number, w in zip(plane[half], weights, strict=True)]
                totals[half] = gpu.plus(totals[half], gpu.times(gpu.plus(*products), weight))
        for distance in (1, 2):
            totals = [gpu.plus(total, gpu.exchange(total, distance)) for total in totals]
        row = gpu.plus(gpu.plus(gpu.times(warp, 16), gpu.shift_right(lane, 2)), start.registers.item())
        with gpu.when(arith.andi(gpu.equal(pair, 0), gpu.less(warp, 2))):
            where = gpu.advance_far(gpu.pointer(target, gpu.SHARED), row, 4)
            gpu.store(where, totals[:1])
            gpu.store(gpu.advance(where, 32), totals[1:])

    inline(target, jnp.int32(start), *accs)


def _pick(index, numbers: Sequence[int]):
    """numbers[index]."""
    value = gpu.int32(numbers[0])
    for i, number in enumerate(numbers[1:], 1):
        value = gpu.choose(gpu.equal(index, i), gpu.int32(number), value)
    return value


def _thread() -> ir.Value:
    """Of the warpgroup; opaque, see `pinned`."""
    return gpu.opaque(gpu.thread_in_warpgroup())


def _lane_and_warp() -> tuple[ir.Value, ir.Value]:
    thread = _thread()
    return gpu.bits_of(thread, WARP - 1), gpu.shift_right(thread, 5)


def _element(register: ir.Value, index: int) -> ir.Value:
    return llvm.extractelement(register, gpu.int32(index))


def _in_vector(*numbers: ir.Value) -> ir.Value:
    """A register of one or two numbers."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(numbers),), numbers[0].type))
    for i, number in enumerate(numbers):
        vector = llvm.insertelement(vector, number, gpu.int32(i))
    return vector


def _scalar(register: ir.Value) -> ir.Value:
    """A register of one number, as a word."""
    if isinstance(register.type, ir.VectorType):
        register = _element(register, 0)
    return register if register.type == gpu.i32_type() else gpu.as_word(register)


def _word(vector: mgpu.FragmentedArray) -> ir.Value:
    return _scalar(vector.registers.item())


def _numbers(array: mgpu.FragmentedArray) -> list[ir.Value]:
    """A thread's numbers of an array of floats."""
    return [_element(r, i) for r in array.registers.flat for i in range(ir.VectorType(r.type).shape[0])]


def _part(numbers: Sequence[ir.Value]) -> mgpu.FragmentedArray:
    """The array of every thread's eight numbers."""
    layout = PART.to_mgpu()
    registers = np.empty(layout.registers_shape((PART_ELEMENTS,)), dtype=object)
    registers.flat = [_in_vector(*numbers)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _splat(number: ir.Value, is_signed: bool | None) -> mgpu.FragmentedArray:
    return mgpu.FragmentedArray.splat(number, (), is_signed=is_signed)


def _vector(number: ir.Value, dtype) -> mgpu.FragmentedArray:
    """The array of every thread's number."""
    layout = VECTOR.to_mgpu()
    registers = np.empty(layout.registers_shape((WARPGROUP,)), dtype=object)
    registers.flat = [_in_vector(number)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True if dtype == jnp.int32 else None)
