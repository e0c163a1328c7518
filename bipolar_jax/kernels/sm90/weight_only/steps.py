"""The steps of the product of float activations as functions of arrays: threads on the GPU, jnp in interpret mode.

Sums are [rows of a tile times 4, width], of rows of 16 by warp: every warp has sums of its own.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR, TILE_TRANSFORMS
from bipolar_jax.kernels.sm90.weight_only import threads as threads
from bipolar_jax.kernels.sm90.weight_only.config import PART, TILE_ROWS, WARPS, WeightOnlyShape

_SPLAT = plgpu.Layout.WG_SPLAT
_VECTOR = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)  # a number of every thread
_X_SUMS_ROWS = TILE_ROWS * WARPS

Sums = list[Float[Array, "rows width"]]  # of products; and of the activations, if they are needed in the end


def no_sums(shape: WeightOnlyShape) -> Sums:
    """Zeros to start a tile from."""
    return [
        plgpu.layout_cast(jnp.zeros((rows, shape.width), jnp.float32), ACCUMULATOR) for rows in _rows_of_sums(shape)
    ]


def add_part(
    shape: WeightOnlyShape,
    sums: Sums,
    planes,
    x,
    scale,
    offset,
    part: Int[Array, ""],
    first_row: Int[Array, ""],
    *,
    emulate: bool,
) -> Sums:
    """Adds the products of a part of K; see `weight_only_threads.add_part`."""
    if emulate:
        return _emulated_part(shape, sums, planes, x, scale, offset, part, first_row)
    operands = [ref for ref in (x, scale, offset) if ref is not None]

    @plgpu.inline_mgpu(
        arg_types=(
            *[ACCUMULATOR] * len(sums),
            plgpu.RefType(TILE_TRANSFORMS),
            *[plgpu.RefType()] * len(operands),
            _SPLAT,
            _SPLAT,
        ),
        return_type=_sums_type(shape),
    )
    def inline(_, *args):
        arrays, refs = args[: len(sums)], args[len(sums) : -2]
        part, first_row = (number.registers.item() for number in args[-2:])
        planes, x, scale, *offset = refs
        numbers = [_numbers(array) for array in arrays]
        new = threads.add_part(
            shape,
            numbers[0],
            numbers[1] if len(numbers) > 1 else [],
            planes,
            x,
            scale,
            offset[0] if offset else None,
            part,
            first_row,
        )
        return _arrays(shape, new)

    return list(inline(*sums, planes, *operands, jnp.int32(part), jnp.int32(first_row)))


def row_terms(shape: WeightOnlyShape, scale, offset, first_row: Int[Array, ""], *, emulate: bool) -> list[Array]:
    """What `scale_rows` needs of a tile; loaded long before. Nothing if there are groups."""
    if shape.group_size is not None:
        return []
    operands = [ref for ref in (scale, offset) if ref is not None]
    if emulate:
        return [_emulated_terms(shape, ref, first_row) for ref in operands]
    count = 2 * shape.row_tiles * len(operands)

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * len(operands), _SPLAT),
        return_type=[plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=_VECTOR)] * count,
    )
    def inline(_, scale, *args):
        *offset, first_row = args
        return [
            _vector(number)
            for number in threads.row_terms(shape, scale, offset[0] if offset else None, first_row.registers.item())
        ]

    return list(inline(*operands, jnp.int32(first_row)))


def scale_rows(shape: WeightOnlyShape, sums: Sums, terms: list[Array], *, emulate: bool) -> Float[Array, "rows width"]:
    """What the warps of a warpgroup have of a tile: scaled sums, with offsets."""
    if shape.group_size is not None:
        return sums[0]
    if emulate:
        by_warp = sums[0].reshape(shape.row_tiles, WARPS, TILE_ROWS, shape.width)
        scales, *offsets = [term.reshape(shape.row_tiles, 1, TILE_ROWS, 1) for term in terms]
        total = by_warp * scales
        if shape.offset:
            total += offsets[0] * sums[1].reshape(1, WARPS, TILE_ROWS, shape.width)
        return total.reshape(sums[0].shape)

    @plgpu.inline_mgpu(
        arg_types=(*[ACCUMULATOR] * len(sums), *[_VECTOR] * len(terms)), return_type=_sums_type(shape)[0]
    )
    def inline(_, *args):
        numbers = [_numbers(array) for array in args[: len(sums)]]
        terms = [number for array in args[len(sums) :] for number in _numbers(array)]
        return _arrays(shape, [threads.scaled(shape, numbers[0], numbers[1] if shape.offset else [], terms)])[0]

    return inline(*sums, *terms)


def prefetch_groups(shape: WeightOnlyShape, scale, offset, part, first_row, *, emulate: bool) -> None:
    """See `weight_only_threads.prefetch_groups`; nothing without groups."""
    if emulate or shape.group_size is None:
        return
    operands = [ref for ref in (scale, offset) if ref is not None]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(operands), _SPLAT, _SPLAT))
    def inline(_, scale, *args):
        *offset, part, first_row = args
        numbers = (number.registers.item() for number in (part, first_row))
        threads.prefetch_groups(shape, scale, offset[0] if offset else None, *numbers)

    inline(*operands, jnp.int32(part), jnp.int32(first_row))


def finish(shape: WeightOnlyShape, sums, bias, out, first_row: Int[Array, ""], *, emulate: bool) -> None:
    """Adds up all warps' sums and the bias, and writes a tile; see `weight_only_threads.finish`."""
    if emulate:
        by_warp = sums[...].reshape(-1, shape.row_tiles, WARPS, TILE_ROWS, shape.width)
        total = jnp.sum(by_warp, axis=(0, 2)).reshape(shape.tiling.rows, shape.width)
        if bias is not None:
            total += bias[...][_emulated_rows(shape, first_row)][:, None]
        out[:, pl.ds(first_row, shape.tiling.rows)] = total.T[: shape.m].astype(shape.dtype)
        return
    operands = [ref for ref in (bias,) if ref is not None]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (2 + len(operands)), _SPLAT))
    def inline(_, sums, out, *args):
        *bias, first_row = args
        threads.finish(shape, sums, bias[0] if bias else None, out, first_row.registers.item())

    inline(sums, out, *operands, jnp.int32(first_row))


def _rows_of_sums(shape: WeightOnlyShape) -> list[int]:
    with_x_sums = shape.offset and shape.group_size is None
    return [shape.sums_rows, _X_SUMS_ROWS] if with_x_sums else [shape.sums_rows]


def _sums_type(shape: WeightOnlyShape) -> list[plgpu.ShapeDtypeStruct]:
    return [
        plgpu.ShapeDtypeStruct((rows, shape.width), jnp.float32, layout=ACCUMULATOR) for rows in _rows_of_sums(shape)
    ]


def _numbers(array: mgpu.FragmentedArray) -> list[ir.Value]:
    """A thread's numbers: by blocks of 64 rows, blocks of tokens, rows r and r + 8, columns."""
    return [_scalar(register) for register in array.registers.flat]


def _scalar(register: ir.Value) -> ir.Value:
    if isinstance(register.type, ir.VectorType):
        return llvm.extractelement(register, ptx.int32(0))
    return register


def _register(number: ir.Value) -> ir.Value:
    return llvm.insertelement(llvm.mlir_undef(ir.VectorType.get((1,), number.type)), number, ptx.int32(0))


def _vector(number: ir.Value) -> mgpu.FragmentedArray:
    """The array of every thread's number."""
    layout = _VECTOR.to_mgpu()
    registers = np.empty(layout.registers_shape((WARPGROUP,)), dtype=object)
    registers.flat = [_register(number)]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _arrays(shape: WeightOnlyShape, sums) -> list[mgpu.FragmentedArray]:
    layout, arrays = ACCUMULATOR.to_mgpu(), []
    for numbers, rows in zip(sums, _rows_of_sums(shape), strict=False):
        registers = np.empty(layout.registers_shape((rows, shape.width)), dtype=object)
        registers.flat = [_register(number) for number in numbers]
        arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
    return arrays


def _emulated_rows(shape: WeightOnlyShape, first_row) -> Int[Array, " rows"]:
    return jnp.minimum(first_row + lax.iota(jnp.int32, shape.tiling.rows), shape.n - 1)


def _emulated_terms(shape: WeightOnlyShape, terms, first_row) -> Float[Array, "rows groups"]:
    return terms[...][_emulated_rows(shape, first_row)]


def _emulated_part(shape: WeightOnlyShape, sums, planes, x, scale, offset, part, first_row) -> Sums:
    """All that the warps add goes to the first one's sums."""
    words = list(planes[...])
    plgpu.commit_smem()  # to the race detector an ordinary read, which the next load would not be ordered after
    index = lax.iota(jnp.uint32, 32)
    codes = sum(
        (((plane[..., None] >> index) & 1) * jnp.uint32(weight)).reshape(plane.shape[0], PART)
        for plane, weight in zip(words, shape.w_format.plane_weights, strict=True)
    )
    values = shape.w_format.values(codes).astype(jnp.float32)
    filled = jnp.pad(x[...].astype(jnp.float32), ((0, shape.width - shape.m), (0, -shape.k % PART + PART)))
    x_part = lax.dynamic_slice_in_dim(filled, part * PART, PART, axis=1)
    offsets = None
    if shape.group_size is not None:
        groups = jnp.minimum((part * PART + lax.iota(jnp.int32, PART)) // shape.group_size, shape.groups - 1)
        values *= _emulated_terms(shape, scale, first_row)[:, groups]
        if shape.offset:
            offsets = _emulated_terms(shape, offset, first_row)[:, groups]
    product = _dot(values, x_part) if offsets is None else _dot(values + offsets, x_part)
    by_warp = product.reshape(shape.row_tiles, 1, TILE_ROWS, shape.width)
    by_warp = jnp.pad(by_warp, ((0, 0), (0, WARPS - 1), (0, 0), (0, 0)))
    new = [sums[0] + by_warp.reshape(sums[0].shape)]
    if len(sums) > 1:
        x_sums = jnp.broadcast_to(jnp.sum(x_part, axis=1), (TILE_ROWS, shape.width))
        new.append(sums[1] + jnp.pad(x_sums, ((0, _X_SUMS_ROWS - TILE_ROWS), (0, 0))))
    return new


def _dot(a: Float[Array, "rows k"], b: Float[Array, "width k"]) -> Float[Array, "rows width"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
