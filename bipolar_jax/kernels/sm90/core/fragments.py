"""What threads hold of an array, and how inline code takes it and gives it back.

Mosaic's own loads and reductions know neither the end of an array nor that several warpgroups share a block. What the
kernel of the decode step needs beyond them is written for single threads (`core.ptx`), with a twin in jnp for interpret
mode (`core.emulation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

WARPS = WARPGROUP // WARP
VECTOR = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)  # element i belongs to thread i
PART = 8 * WARPGROUP  # elements of K that a warpgroup takes at a time: a row of bits in a tile
PART_LAYOUT = plgpu.Layout.WG_STRIDED((PART,), vec_size=8)  # elements 8 i ... belong to thread i
MATRIX = plgpu.Layout.WGMMA
ALONG_ROWS = MATRIX.reduce(1)
SPLAT = plgpu.Layout.WG_SPLAT


@with_twin(lambda number: number)
def pinned(number: Int[Array, ""]) -> Int[Array, ""]:
    """The same number, of which the compiler knows nothing.

    What is computed from it stays in the loop where it is: addresses by the dozen, the same for every layer, would
    be computed once before it, and spilled.
    """

    @plgpu.inline_mgpu(arg_types=(SPLAT,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT))
    def inline(_, number):
        return as_splat(ptx.opaque(number.registers.item()), True)

    return inline(jnp.int32(number))


def repeat(count: int, body: Callable[[Int[Array, ""]], None]) -> None:
    """body(0), body(1), ... as a loop that the compiler cannot unroll, not knowing how long it is."""

    def step(index, carry):
        body(index)
        return carry

    lax.fori_loop(0, pinned(count), step, ())


def thread_index() -> ir.Value:
    """Of the warpgroup; opaque, see `pinned`."""
    return ptx.opaque(ptx.thread_in_warpgroup())


def lane_and_warp() -> tuple[ir.Value, ir.Value]:
    thread = thread_index()
    return ptx.bits_of(thread, WARP - 1), ptx.shift_right(thread, 5)


def element(register: ir.Value, index: int) -> ir.Value:
    return llvm.extractelement(register, ptx.int32(index))


def in_register(*numbers: ir.Value) -> ir.Value:
    """A register of one or two numbers."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(numbers),), numbers[0].type))
    for i, number in enumerate(numbers):
        vector = llvm.insertelement(vector, number, ptx.int32(i))
    return vector


def word_of(register: ir.Value) -> ir.Value:
    """A register of one number, as a word."""
    if isinstance(register.type, ir.VectorType):
        register = element(register, 0)
    return register if register.type == ptx.i32_type() else ptx.as_word(register)


def only_word(vector: mgpu.FragmentedArray) -> ir.Value:
    return word_of(vector.registers.item())


def numbers_of(array: mgpu.FragmentedArray) -> list[ir.Value]:
    """A thread's numbers of an array of floats."""
    return [element(r, i) for r in array.registers.flat for i in range(ir.VectorType(r.type).shape[0])]


def as_part(numbers: Sequence[ir.Value]) -> mgpu.FragmentedArray:
    """The array of every thread's eight numbers."""
    layout = PART_LAYOUT.to_mgpu()
    registers = np.empty(layout.registers_shape((PART,)), dtype=object)
    registers.flat = [in_register(*numbers)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def loaded_part(where: ptx.Pointer, dtype) -> mgpu.FragmentedArray:
    """The array of eight numbers a thread in global memory, aligned to 16 bytes."""
    layout, number = PART_LAYOUT.to_mgpu(), dtype_to_ir_type(dtype)
    registers = np.empty(layout.registers_shape((PART,)), dtype=object)
    registers.flat = [llvm.load(ir.VectorType.get((8,), number), where, alignment=16)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def as_splat(number: ir.Value, is_signed: bool | None) -> mgpu.FragmentedArray:
    return mgpu.FragmentedArray.splat(number, (), is_signed=is_signed)


def as_vector(number: ir.Value, dtype) -> mgpu.FragmentedArray:
    """The array of every thread's number."""
    layout = VECTOR.to_mgpu()
    registers = np.empty(layout.registers_shape((WARPGROUP,)), dtype=object)
    registers.flat = [in_register(number)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True if dtype == jnp.int32 else None)


def tree(combine: Callable[[ir.Value, ir.Value], ir.Value], values: list[ir.Value]) -> ir.Value:
    """All values combined, in few steps that wait for each other."""
    while len(values) > 1:
        pairs = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(values) & ~1 :]
    return values[0]
