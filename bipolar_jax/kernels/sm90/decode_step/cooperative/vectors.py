"""Flat arrays in global memory: bounds-checked loads, polling loads, stores with a phase bit, and prefetches.

A vector is 128 elements, one a thread of the warpgroup. A K slice is 1024 elements, eight a thread.

Vectors `by_parts` are counted in the order of parts of prepared weights (`packing.fields`): element
32 (4 t + w) + 16 b + i of that order is element 128 t + 64 b + 16 w + i of the array. An array that ends within a tile
has a length that says so: elements of the tile beyond its end are 0, and are not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import as_integer, when
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    K_SLICE_LAYOUT,
    SPLAT,
    VECTOR,
    as_k_slice,
    as_vector,
    load_k_slice,
    numbers_of,
    only_word,
    scalar_of,
    thread_index,
)
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.polling import poll_words, store_in_phase
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import RUN, WARPGROUPS
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import Awaited, in_phase, nan_unless_in_phase
from bipolar_jax.packing.fields import TILE_ROWS

CACHE_LINE = 128  # bytes
_VECTOR_TYPE = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR)
_K_SLICE_TYPE = plgpu.ShapeDtypeStruct((K_SLICE,), jnp.float32, layout=K_SLICE_LAYOUT)


def row_of_parts(index: Any) -> Any:
    """The element of an array that comes at an index in the order of parts; of integers, or arrays of them."""
    return (index & ~0x70) | ((index & 0x10) << 2) | ((index & 0x60) >> 1)


def _element(index: Value, by_parts: bool) -> Value:
    """`row_of_parts` of an index that is not negative, or the index itself."""
    if not by_parts:
        return index
    block = ptx.shift_left(ptx.bits_of(index, 0x10), 2)
    warp = ptx.shift_right(ptx.bits_of(index, 0x60), 1)
    return ptx.either_bits(ptx.either_bits(ptx.bits_of(index, ~0x70), block), warp)


def _ends_within_tile(ref, by_parts: bool) -> bool:
    return by_parts and ref.shape[0] % TILE_ROWS != 0


def _load_vector_twin(ref, start, end, by_parts=False):
    index = start + lax.iota(jnp.int32, WARPGROUP)
    element = row_of_parts(index) if by_parts else index
    valid = (index < end) & (element < ref.shape[0])
    return jnp.where(valid, ref[...][jnp.where(valid, element, 0)].astype(_loaded_dtype(ref)), 0)


@with_twin(_load_vector_twin)
def load_vector(ref, start: Int[Array, ""], end: Int[Array, ""] | int, by_parts: bool = False) -> Array:
    """ref[start : start + 128], with 0 from `end` on: float32, or int32 of integers.

    Args:
      ref: flat, in global memory; bfloat16, or 4 bytes an element.
      by_parts: whether `start` and `end` count elements in the order of parts.
    """
    dtype, itemsize = _loaded_dtype(ref), jnp.dtype(ref.dtype).itemsize
    integers, ends_within_tile, size = dtype == jnp.int32, _ends_within_tile(ref, by_parts), ref.shape[0]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), dtype, layout=VECTOR),
    )
    def inline(_, ref, start, end):
        index = ptx.plus(scalar_of(start), thread_index())
        valid, element = ptx.less(index, scalar_of(end)), _element(index, by_parts)
        if ends_within_tile:
            valid = ptx.bits_of(valid, ptx.less(element, size))
        element = ptx.choose(valid, element, ptx.int32(0))
        pointer = ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), element, itemsize)
        word = ptx.choose(valid, _load_word(pointer, itemsize), ptx.int32(0))
        return as_vector(word if integers else ptx.as_float(word), dtype)

    return inline(ref, jnp.int32(start), jnp.int32(end))


def _load_head_twin(ref, start, rotation, size):
    return ref[...][start + (lax.iota(jnp.int32, WARPGROUP) + rotation) % size].astype(_loaded_dtype(ref))


@with_twin(_load_head_twin)
def load_head(ref, start: Int[Array, ""], rotation: int, size: int) -> Float[Array, "128"]:
    """A vector whose element i is ref[start + (i + rotation) mod size], float32; of fewer than 128 it has copies.

    Args:
      ref: flat, in global memory; bfloat16 or float32.
      size: a power of two.
    """
    itemsize = jnp.dtype(ref.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT), return_type=_VECTOR_TYPE)
    def inline(_, ref, start):
        element = ptx.bits_of(ptx.plus(thread_index(), rotation), size - 1)
        pointer = ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), ptx.plus(scalar_of(start), element), itemsize)
        return as_vector(ptx.as_float(_load_word(pointer, itemsize)), jnp.float32)

    return inline(ref, jnp.int32(start))


def _load_word(pointer: Value, itemsize: int) -> Value:
    """The bits of a float32 or int32, or of a bfloat16 as a float32."""
    return ptx.shift_left(ptx.load_half(pointer), 16) if itemsize == 2 else ptx.load(pointer, 1)[0]


def _loaded_dtype(ref) -> jnp.dtype:
    if ref.dtype != jnp.bfloat16 and jnp.dtype(ref.dtype).itemsize != 4:
        raise ValueError(f"vectors are bfloat16 or have 4 bytes an element, got {ref.dtype}")
    return jnp.int32 if jnp.issubdtype(ref.dtype, jnp.integer) else jnp.float32


def _poll_vectors_twin(ref, starts, rotations, awaited, size=WARPGROUP):
    lanes = lax.iota(jnp.int32, WARPGROUP)
    return [
        nan_unless_in_phase(ref[...][start + (lanes + rotation) % size], awaited.phase)
        for start, rotation in zip(starts, rotations, strict=True)
    ]


@with_twin(_poll_vectors_twin)
def poll_vectors(
    ref, starts: Sequence[Int[Array, ""]], rotations: Sequence[int], awaited: Awaited, size: int = WARPGROUP
) -> list[Float[Array, "128"]]:
    """Vectors that other blocks write; all loads are in flight at once.

    Args:
      ref: flat float32 in global memory.
      starts: index of each vector's first element.
      rotations: for each vector r: its element i is ref[start + (i + r) mod size].
      awaited: what to poll for.
      size: a power of two; of fewer than 128 elements a vector has copies.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * (2 + len(starts))), return_type=tuple(_VECTOR_TYPE for _ in starts)
    )
    def inline(_, ref, phase, needed, *starts):
        thread, base = thread_index(), ptx.pointer(ref, ptx.GLOBAL)
        pointers = []
        for start, rotation in zip(starts, rotations, strict=True):
            element = ptx.bits_of(ptx.plus(thread, rotation), size - 1)
            pointers.append(ptx.advance_far(base, ptx.plus(scalar_of(start), element), 4))
        words = poll_words([(pointer, 1) for pointer in pointers], scalar_of(phase), scalar_of(needed))
        return tuple(as_vector(ptx.as_float(word), jnp.float32) for (word,) in words)

    return list(inline(ref, jnp.int32(awaited.phase), as_integer(awaited.needed), *map(jnp.int32, starts)))


def _store_vector_twin(ref, values, start, count, phase, by_parts=False):
    for i in range(0, WARPGROUP, RUN):
        element = row_of_parts(start + i) if by_parts else start + i

        @when((i < count) & (element < ref.shape[0]))
        def _(i=i, element=element):
            ref[pl.ds(element, RUN)] = in_phase(values[i : i + RUN], phase)


@with_twin(_store_vector_twin)
def store_vector(
    ref,
    values: Float[Array, "128"],
    start: Int[Array, ""],
    count: Int[Array, ""] | int,
    phase: Int[Array, ""] | int,
    by_parts: bool = False,
) -> None:
    """ref[start : start + count] = values[:count], each with the phase bit.

    Args:
      ref: flat float32 in global memory.
      values: in the layout VECTOR.
      count: a multiple of 16; nothing is stored if it is not positive.
      by_parts: whether `start` counts elements in the order of parts.
    """
    ends_within_tile, size = _ends_within_tile(ref, by_parts), ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), VECTOR, SPLAT, SPLAT, SPLAT))
    def inline(_, ref, values, start, count, phase):
        thread = thread_index()
        valid = ptx.less(thread, scalar_of(count))
        if ends_within_tile:
            valid = ptx.bits_of(valid, ptx.less(_element(ptx.plus(scalar_of(start), thread), by_parts), size))
        with ptx.when(valid):
            element = _element(ptx.plus(scalar_of(start), thread), by_parts)
            pointer = ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), element, 4)
            store_in_phase(pointer, only_word(values), scalar_of(phase))

    inline(ref, values, jnp.int32(start), jnp.int32(count), jnp.int32(phase))


def _poll_slices_twin(ref, starts, end, awaited, turn=WARPGROUPS):
    del turn
    indices = [start + lax.iota(jnp.int32, K_SLICE) for start in starts]
    return [
        jnp.where(i < end, nan_unless_in_phase(ref[...][jnp.where(i < end, i, 0)], awaited.phase), 0) for i in indices
    ]


@with_twin(_poll_slices_twin)
def poll_slices(
    ref, starts: Sequence[Int[Array, ""]], end: int, awaited: Awaited, turn: int = WARPGROUPS
) -> list[Float[Array, "1024"]]:
    """K slices that other blocks write; all loads are in flight at once.

    Args:
      ref: flat float32 in global memory.
      starts: index of each slice's first element, as `quantize_token.slice_starts` has them.
      end: a multiple of 8; elements from there on are 0.
      awaited: what to poll for.
      turn: warpgroups that take the vector's slices in turn.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * (2 + len(starts))), return_type=tuple(_K_SLICE_TYPE for _ in starts)
    )
    def inline(_, ref, phase, needed, *starts):
        first, base = ptx.times(thread_index(), 8), ptx.pointer(ref, ptx.GLOBAL)
        loads, inside = [], []
        for i, start in enumerate(starts):
            index = ptx.plus(scalar_of(start), first)
            # None where the slices of all warpgroups lie before the end.
            inside.append(ptx.less(index, end) if (i + 1) * turn * K_SLICE > end else None)
            if inside[-1] is not None:
                index = ptx.choose(inside[-1], index, ptx.int32(0))
            pointer = ptx.advance_far(base, index, 4)
            loads += [(pointer, 4), (ptx.advance(pointer, 16), 4)]
        quads = poll_words(loads, scalar_of(phase), scalar_of(needed))
        slices = []
        for valid, low, high in zip(inside, quads[::2], quads[1::2], strict=True):
            numbers = [ptx.as_float(word) for word in (*low, *high)]
            if valid is not None:
                numbers = [ptx.choose(valid, number, ptx.float32(0)) for number in numbers]
            slices.append(as_k_slice(numbers))
        return tuple(slices)

    return list(inline(ref, jnp.int32(awaited.phase), as_integer(awaited.needed), *map(jnp.int32, starts)))


def _load_slice_twin(ref, start, end):
    _check_slice_dtype(ref)
    index = start + lax.iota(jnp.int32, K_SLICE)
    return ref[...][jnp.where(index < end, index, end - 8)]


@with_twin(_load_slice_twin)
def load_slice(ref, start: Int[Array, ""], end: Int[Array, ""]) -> Float[Array, "1024"]:
    """ref[start : start + 1024] in its dtype; elements from `end` on are undefined.

    The values are not touched, not even zeroed: that would wait for the loads.

    Args:
      ref: flat float32 or bfloat16 in global memory.
      start, end: multiples of 8.
    """
    _check_slice_dtype(ref)
    dtype = ref.dtype

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((K_SLICE,), dtype, layout=K_SLICE_LAYOUT),
    )
    def inline(_, ref, start, end):
        index, end = ptx.plus(scalar_of(start), ptx.times(thread_index(), 8)), scalar_of(end)
        index = ptx.choose(ptx.less(index, end), index, ptx.plus(end, -8))
        pointer = ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), index, jnp.dtype(dtype).itemsize)
        return load_k_slice(pointer, dtype)

    return inline(ref, jnp.int32(start), jnp.int32(end))


def _check_slice_dtype(ref) -> None:
    if ref.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"K slices are loaded from bfloat16 or float32, not from {ref.dtype}")


@with_twin(lambda ref, start, count, by_parts=False: None)
def prefetch(ref, start: Int[Array, ""], count: Int[Array, ""] | int, by_parts: bool = False) -> None:
    """Prefetches ref[start : start + count] of a flat array to the L2 cache: one line a thread, at most 128 lines.

    A partial line at the end, where `start` is not aligned to lines, is not prefetched. With `by_parts`, `start` counts
    elements in the order of parts, of which a thread prefetches 16 in a row.
    """
    itemsize = jnp.dtype(ref.dtype).itemsize
    line = RUN if by_parts else CACHE_LINE // itemsize
    ends_within_tile, size = _ends_within_tile(ref, by_parts), ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def inline(_, ref, start, count):
        element = ptx.times(thread_index(), line)
        valid = ptx.less(element, scalar_of(count))
        if ends_within_tile:
            valid = ptx.bits_of(valid, ptx.less(_element(ptx.plus(scalar_of(start), element), by_parts), size))
        with ptx.when(valid):
            index = _element(ptx.plus(scalar_of(start), element), by_parts)
            ptx.prefetch(ptx.advance_far(ptx.pointer(ref, ptx.GLOBAL), index, itemsize))

    inline(ref, jnp.int32(start), jnp.int32(count))


@with_twin(lambda ref, count: None)
def prefetch_lines(ref, count: Int[Array, ""]) -> None:
    """Prefetches the first `count` lines of 128 bytes of a contiguous array to the L2 cache, at most 128 lines."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def inline(_, ref, count):
        line = thread_index()
        with ptx.when(ptx.less(line, scalar_of(count))):
            ptx.prefetch(ptx.advance(ptx.pointer(ref, ptx.GLOBAL), ptx.times(line, CACHE_LINE)))

    inline(ref, jnp.int32(count))


def _zero_beyond_twin(values, start, end):
    return jnp.where(start + lax.iota(jnp.int32, K_SLICE) < end, values, 0)


@with_twin(_zero_beyond_twin)
def zero_beyond(values: Float[Array, "1024"], start: Int[Array, ""], end: Int[Array, ""] | int) -> Float[Array, "1024"]:
    """A K slice whose first element has the index `start`, with 0 from the index `end` on; both are multiples of 8."""

    @plgpu.inline_mgpu(arg_types=(K_SLICE_LAYOUT, SPLAT, SPLAT), return_type=_K_SLICE_TYPE)
    def inline(_, values, start, end):
        index = ptx.plus(scalar_of(start), ptx.times(thread_index(), 8))
        inside = ptx.less(index, scalar_of(end))
        return as_k_slice([ptx.choose(inside, number, ptx.float32(0)) for number in numbers_of(values)])

    return inline(values, jnp.int32(start), jnp.int32(end))
