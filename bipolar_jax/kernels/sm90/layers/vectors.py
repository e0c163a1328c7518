"""Vectors in memory: loads that end where the array ends, and stores of a part."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90 import instructions as gpu
from bipolar_jax.kernels.sm90.layers.registers import (
    PART,
    PART_ELEMENTS,
    SPLAT,
    VECTOR,
    as_part,
    as_vector,
    numbers_of,
    only_word,
    thread_index,
)
from bipolar_jax.kernels.sm90.row_threads import WARPGROUP

_STORED = 32  # numbers, at least, where vectors are stored


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
        arg_types=(plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), dtype, layout=VECTOR),
    )
    def inline(_, ref, start, end):
        element = gpu.bits_of(gpu.plus(thread_index(), turned), WARPGROUP - 1) if turned else thread_index()
        index = gpu.plus(start.registers.item(), element)
        valid = gpu.less(index, end.registers.item())
        where = gpu.advance_far(gpu.pointer(ref, gpu.GLOBAL), gpu.choose(valid, index, gpu.int32(0)), size)
        word = gpu.shift_left(gpu.load_half(where), 16) if size == 2 else gpu.load(where, 1)[0]
        word = gpu.choose(valid, word, gpu.int32(0))
        return as_vector(word if integers else gpu.as_float(word), dtype)

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

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), VECTOR, SPLAT, SPLAT))
    def inline(_, ref, values, start, count):
        thread = thread_index()
        with gpu.when(gpu.less(thread, count.registers.item())):
            index = gpu.plus(start.registers.item(), thread)
            gpu.store(gpu.advance_far(gpu.pointer(ref, gpu.GLOBAL), index, 4), [only_word(values)])

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
        arg_types=(plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((PART_ELEMENTS,), jnp.float32, layout=PART),
    )
    def inline(_, ref, start, end):
        index = gpu.plus(start.registers.item(), gpu.times(thread_index(), 8))
        valid = gpu.less(index, end.registers.item())
        where = gpu.advance_far(gpu.pointer(ref, gpu.GLOBAL), gpu.choose(valid, index, gpu.int32(0)), size)
        if size == 2:
            numbers = [number for word in gpu.load(where, 4) for number in gpu.expand("bf16", word)]
        else:
            numbers = [gpu.as_float(word) for i in range(2) for word in gpu.load(gpu.advance(where, 16 * i), 4)]
        return as_part([gpu.choose(valid, number, gpu.float32(0)) for number in numbers])

    return inline(ref, jnp.int32(start), jnp.int32(end))


def clear_beyond(
    part: Float[Array, "1024"], start: Int[Array, ""], end: Int[Array, ""] | int, *, emulate: bool
) -> Float[Array, "1024"]:
    """The part of an array that begins at `start`, 0 from `end` on; both are multiples of 8."""
    if emulate:
        return jnp.where(start + lax.iota(jnp.int32, PART_ELEMENTS) < end, part, 0)

    @plgpu.inline_mgpu(
        arg_types=(PART, SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((PART_ELEMENTS,), jnp.float32, layout=PART),
    )
    def inline(_, part, start, end):
        index = gpu.plus(start.registers.item(), gpu.times(thread_index(), 8))
        inside = gpu.less(index, end.registers.item())
        return as_part([gpu.choose(inside, number, gpu.float32(0)) for number in numbers_of(part)])

    return inline(part, jnp.int32(start), jnp.int32(end))
