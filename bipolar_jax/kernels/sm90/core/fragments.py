"""Fragments: what the threads of a warpgroup hold of an array, as values of `core.ptx` and back.

Mosaic's own loads and reductions know neither the end of an array nor that several warpgroups share a block. Code that
needs more is written for single threads in `core.ptx`, inside `plgpu.inline_mgpu`, and paired with a twin in jnp
(`core.emulation`). The functions here convert between the two views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import dtype_to_ir_type
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.hardware import WARP, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE

Fragment = mgpu.FragmentedArray  # an array inside `plgpu.inline_mgpu`; `registers` are this thread's

WARPS = WARPGROUP // WARP
VECTOR = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)  # element i belongs to thread i
K_SLICE_LAYOUT = plgpu.Layout.WG_STRIDED((K_SLICE,), vec_size=8)  # elements 8 i to 8 i + 7 belong to thread i
MATRIX = plgpu.Layout.WGMMA
ALONG_ROWS = MATRIX.reduce(1)
SPLAT = plgpu.Layout.WG_SPLAT


def canonical_layout(tiling: plgpu.Tiling, warp_dims, lane_dims, vector_dim: int) -> Any:
    """`plgpu.Layout.TILED` of a tiling that need not be canonical: it may have dimensions of size 1."""
    layout = mgpu.TiledLayout(tiling, warp_dims, lane_dims, vector_dim, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


@with_twin(lambda number: number)
def pinned(number: Int[Array, ""]) -> Int[Array, ""]:
    """The same number, opaque to the compiler.

    Addresses computed from it stay inside the loop. The compiler would move dozens that are the same for every layer in
    front of the loop, and spill them.
    """

    @plgpu.inline_mgpu(arg_types=(SPLAT,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT))
    def inline(_, number):
        return as_splat(ptx.opaque(scalar_of(number)), True)

    return inline(jnp.int32(number))


def repeat(count: int, body: Callable[[Int[Array, ""]], None]) -> None:
    """body(0), body(1), ... as a loop whose length the compiler does not know, so that it does not unroll it."""

    def step(index, carry):
        body(index)
        return carry

    lax.fori_loop(0, pinned(count), step, ())


# Below: for use within `plgpu.inline_mgpu`.


def thread_index() -> Value:
    """The thread's index in its warpgroup; opaque, see `pinned`."""
    return ptx.opaque(ptx.thread_in_warpgroup())


def lane_and_warp() -> tuple[Value, Value]:
    """The thread's lane in its warp, and the warp's index in the warpgroup."""
    thread = thread_index()
    return ptx.bits_of(thread, WARP - 1), ptx.shift_right(thread, 5)


def scalar_of(splat: Fragment) -> Value:
    """The value of an array of shape () in the layout SPLAT."""
    return splat.registers.item()


def element(register: Value, index: int) -> Value:
    """An element of a register; the register itself if it is a scalar."""
    if isinstance(register.type, ir.VectorType):
        return llvm.extractelement(register, ptx.int32(index))
    return register


def in_register(*numbers: Value) -> Value:
    """A register of several numbers: an MLIR vector."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(numbers),), numbers[0].type))
    for i, number in enumerate(numbers):
        vector = llvm.insertelement(vector, number, ptx.int32(i))
    return vector


def word_of(register: Value) -> Value:
    """A register of one number, as a word."""
    number = element(register, 0)
    return number if number.type == ptx.i32_type() else ptx.as_word(number)


def only_word(vector: Fragment) -> Value:
    """The thread's element of an array of which each thread holds one, as a word."""
    return word_of(vector.registers.item())


def packed_word(register: Value) -> Value:
    """A register of two 16-bit floats, as a word."""
    return llvm.bitcast(ptx.i32_type(), register)


def numbers_of(array: Fragment) -> list[Value]:
    """The thread's elements of an array, register by register."""
    return [element(register, i) for register in array.registers.flat for i in range(_elements(register))]


def as_array(
    numbers: Sequence[Value], shape: tuple[int, ...], layout: Any, *, is_signed: bool | None = None
) -> Fragment:
    """The array of which every thread holds these elements: the inverse of `numbers_of`."""
    layout = layout.to_mgpu()
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    count = len(numbers) // math.prod(registers.shape)
    registers.flat = [in_register(*numbers[i : i + count]) for i in range(0, len(numbers), count)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def as_k_slice(numbers: Sequence[Value]) -> Fragment:
    """The array [K_SLICE] of every thread's eight numbers."""
    return as_array(numbers, (K_SLICE,), K_SLICE_LAYOUT)


def load_k_slice(ptr: Pointer, dtype) -> Fragment:
    """The array [K_SLICE] whose eight numbers of this thread are at a pointer to global memory, aligned to 16 bytes."""
    layout, number = K_SLICE_LAYOUT.to_mgpu(), dtype_to_ir_type(dtype)
    registers = np.empty(layout.registers_shape((K_SLICE,)), dtype=object)
    registers.flat = [llvm.load(ir.VectorType.get((8,), number), ptr, alignment=16)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def as_splat(number: Value, is_signed: bool | None) -> Fragment:
    """The array of shape () of a value that is the same in all threads."""
    return mgpu.FragmentedArray.splat(number, (), is_signed=is_signed)


def as_vector(number: Value, dtype) -> Fragment:
    """The array [WARPGROUP] of every thread's number."""
    return as_array([number], (WARPGROUP,), VECTOR, is_signed=True if dtype == jnp.int32 else None)


def tree(combine: Callable[[Value, Value], Value], values: list[Value]) -> Value:
    """All values combined pairwise: a chain of about log2(len(values)) dependent steps."""
    while len(values) > 1:
        pairs = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(values) & ~1 :]
    return values[0]


def _elements(register: Value) -> int:
    return ir.VectorType(register.type).shape[0] if isinstance(register.type, ir.VectorType) else 1
