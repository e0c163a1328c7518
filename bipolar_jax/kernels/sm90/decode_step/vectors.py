"""Vectors in memory: loads that end where the array ends, or that wait for other blocks; stores; and prefetches."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import (
    K_SLICE_LAYOUT,
    SPLAT,
    VECTOR,
    as_k_slice,
    as_vector,
    load_k_slice,
    numbers_of,
    only_word,
    thread_index,
)
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.polling import await_words, checked, store_marked, with_mark

_STORED = 32  # numbers, at least, where vectors are stored


def load_vector(ref, start: Int[Array, ""], end: Int[Array, ""] | int, *, emulate: bool) -> Array:
    """ref[start : start + 128] of a flat array in memory, 0 from `end` on: float32, or int32 of integers.

    The array has 4 bytes a number, or is bfloat16.
    """
    integers, size = jnp.issubdtype(ref.dtype, jnp.integer), jnp.dtype(ref.dtype).itemsize
    dtype = jnp.int32 if integers else jnp.float32
    if ref.dtype != jnp.bfloat16 and size != 4:
        raise ValueError(f"vectors are loaded of bfloat16 or of 4 bytes a number, not of {ref.dtype}")
    if emulate:
        index = start + lax.iota(jnp.int32, WARPGROUP)
        return jnp.where(index < end, ref[...][jnp.where(index < end, index, 0)].astype(dtype), 0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), dtype, layout=VECTOR),
    )
    def inline(_, ref, start, end):
        index = ptx.plus(start.registers.item(), thread_index())
        valid = ptx.less(index, end.registers.item())
        where = ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), ptx.choose(valid, index, ptx.int32(0)), size)
        word = ptx.shift_left(ptx.load_half(where), 16) if size == 2 else ptx.load(where, 1)[0]
        word = ptx.choose(valid, word, ptx.int32(0))
        return as_vector(word if integers else ptx.as_float(word), dtype)

    return inline(ref, jnp.int32(start), jnp.int32(end))


def await_vectors(
    ref,
    places: Sequence[tuple[Int[Array, ""], int]],
    mark: Int[Array, ""],
    needed: Int[Array, ""],
    *,
    emulate: bool,
) -> list[Float[Array, "128"]]:
    """Vectors of 128 numbers that other blocks leave in a flat float32 array in memory, all loaded at once.

    Args:
      ref: the array.
      places: where they start; and by how much each is turned: element i is number (i + turned) mod 128.
      mark: of the numbers.
      needed: 1 to wait for it, or 0.
    """
    if emulate:
        lanes = lax.iota(jnp.int32, WARPGROUP)
        return [checked(ref[...][start + (lanes + turned) % WARPGROUP], mark) for start, turned in places]
    vector = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * (2 + len(places))), return_type=tuple(vector for _ in places)
    )
    def inline(_, ref, mark, needed, *starts):
        thread, base = thread_index(), ptx.pointer(ref, ptx.GLOBAL)
        pointers = []
        for start, (_, turned) in zip(starts, places, strict=True):
            element = ptx.bits_of(ptx.plus(thread, turned), WARPGROUP - 1)
            pointers.append(ptx.advance_far(base, ptx.plus(start.registers.item(), element), 4))
        words = await_words([(where, 1) for where in pointers], mark.registers.item(), needed.registers.item())
        return tuple(as_vector(ptx.as_float(word), jnp.float32) for (word,) in words)

    return list(inline(ref, jnp.int32(mark), jnp.int32(needed), *(jnp.int32(start) for start, _ in places)))


def store_vector(
    ref, values: Array, start: Int[Array, ""], count: Int[Array, ""] | int, mark: Int[Array, ""], *, emulate: bool
) -> None:
    """ref[start : start + count] = values[:count], marked, of a flat float32 array in memory.

    The count is a multiple of 32.
    """
    if emulate:
        for i in range(0, WARPGROUP, _STORED):

            @pl.when(i < count)
            def _(i=i):
                ref[pl.ds(start + i, _STORED)] = with_mark(values[i : i + _STORED], mark)

        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), VECTOR, SPLAT, SPLAT, SPLAT))
    def inline(_, ref, values, start, count, mark):
        thread = thread_index()
        with ptx.when(ptx.less(thread, count.registers.item())):
            where = ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), ptx.plus(start.registers.item(), thread), 4)
            store_marked(where, only_word(values), mark.registers.item())

    inline(ref, values, jnp.int32(start), jnp.int32(count), jnp.int32(mark))


def await_parts(
    ref,
    starts: Sequence[Int[Array, ""]],
    end: int,
    mark: Int[Array, ""],
    needed: Int[Array, ""],
    *,
    emulate: bool,
) -> list[Float[Array, "1024"]]:
    """Parts of 1024 numbers that other blocks leave in a flat float32 array in memory, all loaded at once.

    Args:
      ref: the array.
      starts: of the parts, multiples of 8.
      end: from which on all is 0, a multiple of 8.
      mark: of the numbers.
      needed: 1 to wait for it, or 0.
    """
    if emulate:
        indices = [start + lax.iota(jnp.int32, K_SLICE) for start in starts]
        return [jnp.where(i < end, checked(ref[...][jnp.where(i < end, i, 0)], mark), 0) for i in indices]
    part = plgpu.ShapeDtypeStruct((K_SLICE,), jnp.float32, layout=K_SLICE_LAYOUT)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * (2 + len(starts))), return_type=tuple(part for _ in starts)
    )
    def inline(_, ref, mark, needed, *starts):
        first, base = ptx.times(thread_index(), 8), ptx.pointer(ref, ptx.GLOBAL)
        indices = [ptx.plus(start.registers.item(), first) for start in starts]
        inside = [ptx.less(index, end) for index in indices]
        places = []
        for index, valid in zip(indices, inside, strict=True):
            where = ptx.advance_far(base, ptx.choose(valid, index, ptx.int32(0)), 4)
            places += [(where, 4), (ptx.advance(where, 16), 4)]
        fours = await_words(places, mark.registers.item(), needed.registers.item())
        parts = []
        for valid, low, high in zip(inside, fours[::2], fours[1::2], strict=True):
            parts.append(as_k_slice([ptx.choose(valid, ptx.as_float(w), ptx.float32(0)) for w in (*low, *high)]))
        return tuple(parts)

    return list(inline(ref, jnp.int32(mark), jnp.int32(needed), *map(jnp.int32, starts)))


def load_part(ref, start: Int[Array, ""], end: Int[Array, ""], *, emulate: bool) -> Float[Array, "1024"]:
    """ref[start : start + 1024] of a flat float32 or bfloat16 array in memory, in its dtype; from `end` on any numbers.

    Start and end are multiples of 8. Nothing is done to the numbers, which would be to wait for them.
    """
    dtype = ref.dtype
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"parts are loaded of bfloat16 or float32, not of {dtype}")
    if emulate:
        index = start + lax.iota(jnp.int32, K_SLICE)
        return ref[...][jnp.where(index < end, index, end - 8)]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((K_SLICE,), dtype, layout=K_SLICE_LAYOUT),
    )
    def inline(_, ref, start, end):
        index, end = ptx.plus(start.registers.item(), ptx.times(thread_index(), 8)), end.registers.item()
        index = ptx.choose(ptx.less(index, end), index, ptx.plus(end, -8))
        where = ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), index, jnp.dtype(dtype).itemsize)
        return load_k_slice(where, dtype)

    return inline(ref, jnp.int32(start), jnp.int32(end))


def prefetch_vector(ref, start: Int[Array, ""], count: Int[Array, ""] | int, *, emulate: bool) -> None:
    """Has the L2 cache load ref[start : start + count] of a flat array in memory, 128 lines of it at most.

    Where it begins or goes on beyond them within a line, what is left is loaded when it is read.
    """
    if emulate:
        return
    line = 128 // jnp.dtype(ref.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def inline(_, ref, start, count):
        element = ptx.times(thread_index(), line)
        with ptx.when(ptx.less(element, count.registers.item())):
            index = ptx.plus(start.registers.item(), element)
            ptx.prefetch(ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), index, 128 // line))

    inline(ref, jnp.int32(start), jnp.int32(count))


def clear_beyond(
    part: Float[Array, "1024"], start: Int[Array, ""], end: Int[Array, ""] | int, *, emulate: bool
) -> Float[Array, "1024"]:
    """The part of an array that begins at `start`, 0 from `end` on; both are multiples of 8."""
    if emulate:
        return jnp.where(start + lax.iota(jnp.int32, K_SLICE) < end, part, 0)

    @plgpu.inline_mgpu(
        arg_types=(K_SLICE_LAYOUT, SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((K_SLICE,), jnp.float32, layout=K_SLICE_LAYOUT),
    )
    def inline(_, part, start, end):
        index = ptx.plus(start.registers.item(), ptx.times(thread_index(), 8))
        inside = ptx.less(index, end.registers.item())
        return as_k_slice([ptx.choose(inside, number, ptx.float32(0)) for number in numbers_of(part)])

    return inline(part, jnp.int32(start), jnp.int32(end))
