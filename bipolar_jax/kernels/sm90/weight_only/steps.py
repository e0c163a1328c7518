"""The steps of the weight-only product on arrays: device functions around `threads`, each with its twin in jnp.

Partial sums are [4 * tile_rows, width]: one partial sum per warp, interleaved in slabs of 16 rows.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    SPLAT,
    VECTOR,
    WARPS,
    Fragment,
    as_array,
    as_vector,
    numbers_of,
    scalar_of,
)
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR, K_SLICE, TILE_TRANSFORMS
from bipolar_jax.kernels.sm90.weight_only import threads
from bipolar_jax.kernels.sm90.weight_only.config import TILE_ROWS, WeightOnlyShape

_X_SUMS_ROWS = TILE_ROWS * WARPS

# Of products; and, if the rows have offsets and one scale each, of the activations.
Sums = list[Float[Array, "rows width"]]


def zero_sums(shape: WeightOnlyShape) -> Sums:
    """Zeros to start a tile from."""
    return [
        plgpu.layout_cast(jnp.zeros((rows, shape.width), jnp.float32), ACCUMULATOR) for rows in _rows_of_sums(shape)
    ]


def _add_slice_twin(shape: WeightOnlyShape, sums: Sums, planes, x, scale, offset, k_slice, first_row) -> Sums:
    """Adds everything to the first warp's sums."""
    plane_words = list(planes[...])
    plgpu.commit_smem()  # for the race detector: orders this read before the next load into the slot
    index = lax.iota(jnp.uint32, 32)[None, None]
    codes = sum(
        (((plane[..., None] >> index) & 1) * jnp.uint32(weight)).reshape(plane.shape[0], K_SLICE)
        for plane, weight in zip(plane_words, shape.w_format.plane_weights, strict=True)
    )
    values = shape.w_format.values(codes).astype(jnp.float32)
    filled = jnp.pad(x[...].astype(jnp.float32), ((0, shape.width - shape.m), (0, -shape.k % K_SLICE + K_SLICE)))
    x_slice = lax.dynamic_slice_in_dim(filled, k_slice * K_SLICE, K_SLICE, axis=1)
    offsets = None
    if shape.group_size is not None:
        groups = jnp.minimum((k_slice * K_SLICE + lax.iota(jnp.int32, K_SLICE)) // shape.group_size, shape.groups - 1)
        values *= _terms_of_tile(shape, scale, first_row)[:, groups]
        if shape.offset:
            offsets = _terms_of_tile(shape, offset, first_row)[:, groups]
    product = _dot(values, x_slice) if offsets is None else _dot(values + offsets, x_slice)
    by_warp = product.reshape(shape.row_tiles, 1, TILE_ROWS, shape.width)
    by_warp = jnp.pad(by_warp, ((0, 0), (0, WARPS - 1), (0, 0), (0, 0)))
    new = [sums[0] + by_warp.reshape(sums[0].shape)]
    if len(sums) > 1:
        x_sums = jnp.broadcast_to(jnp.sum(x_slice, axis=1), (TILE_ROWS, shape.width))
        new.append(sums[1] + jnp.pad(x_sums, ((0, _X_SUMS_ROWS - TILE_ROWS), (0, 0))))
    return new


@with_twin(_add_slice_twin)
def add_slice(
    shape: WeightOnlyShape,
    sums: Sums,
    planes,
    x,
    scale,
    offset,
    k_slice: Int[Array, ""],
    first_row: Int[Array, ""],
) -> Sums:
    """Adds the products over one slice of K; see `threads.add_slice`."""
    operands = [ref for ref in (x, scale, offset) if ref is not None]

    @plgpu.inline_mgpu(
        arg_types=(
            *[ACCUMULATOR] * len(sums),
            plgpu.RefType(TILE_TRANSFORMS),
            *[plgpu.RefType()] * len(operands),
            SPLAT,
            SPLAT,
        ),
        return_type=_sums_type(shape),
    )
    def inline(_, *args):
        numbers, refs = [numbers_of(array) for array in args[: len(sums)]], args[len(sums) : -2]
        k_slice, first_row = map(scalar_of, args[-2:])
        planes, x, scale, *offset = refs
        new = threads.add_slice(
            shape,
            numbers[0],
            numbers[1] if len(numbers) > 1 else [],
            planes,
            x,
            scale,
            offset[0] if offset else None,
            k_slice,
            first_row,
        )
        return _arrays(shape, new)

    return list(inline(*sums, planes, *operands, jnp.int32(k_slice), jnp.int32(first_row)))


def _row_terms_twin(shape: WeightOnlyShape, scale, offset, first_row) -> list[Array]:
    if shape.group_size is not None:
        return []
    return [_terms_of_tile(shape, ref, first_row) for ref in (scale, offset) if ref is not None]


@with_twin(_row_terms_twin)
def row_terms(shape: WeightOnlyShape, scale, offset, first_row: Int[Array, ""]) -> list[Array]:
    """Scales and offsets of a tile's rows for `scale_rows`, loaded before the tile is summed; empty with groups."""
    if shape.group_size is not None:
        return []
    operands = [ref for ref in (scale, offset) if ref is not None]
    count = 2 * shape.row_tiles * len(operands)

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * len(operands), SPLAT),
        return_type=[plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR)] * count,
    )
    def inline(_, scale, *args):
        *offset, first_row = args
        numbers = threads.row_terms(shape, scale, offset[0] if offset else None, scalar_of(first_row))
        return [as_vector(number, jnp.float32) for number in numbers]

    return list(inline(*operands, jnp.int32(first_row)))


def _scale_rows_twin(shape: WeightOnlyShape, sums: Sums, terms: list[Array]) -> Float[Array, "rows width"]:
    if shape.group_size is not None:
        return sums[0]
    by_warp = sums[0].reshape(shape.row_tiles, WARPS, TILE_ROWS, shape.width)
    scales, *offsets = [term.reshape(shape.row_tiles, 1, TILE_ROWS, 1) for term in terms]
    total = by_warp * scales
    if shape.offset:
        total += offsets[0] * sums[1].reshape(1, WARPS, TILE_ROWS, shape.width)
    return total.reshape(sums[0].shape)


@with_twin(_scale_rows_twin)
def scale_rows(shape: WeightOnlyShape, sums: Sums, terms: list[Array]) -> Float[Array, "rows width"]:
    """The warps' sums of a tile, scaled, offsets included; with groups they already are."""
    if shape.group_size is not None:
        return sums[0]

    @plgpu.inline_mgpu(arg_types=(*[ACCUMULATOR] * len(sums), *[VECTOR] * len(terms)), return_type=_sums_type(shape)[0])
    def inline(_, *args):
        numbers = [numbers_of(array) for array in args[: len(sums)]]
        terms = [number for array in args[len(sums) :] for number in numbers_of(array)]
        return _arrays(shape, [threads.scaled(shape, numbers[0], numbers[1] if shape.offset else [], terms)])[0]

    return inline(*sums, *terms)


@with_twin(lambda shape, scale, offset, k_slice, first_row: None)
def prefetch_groups(shape: WeightOnlyShape, scale, offset, k_slice: Int[Array, ""], first_row: Int[Array, ""]) -> None:
    """Prefetches the groups' scales and offsets of a slice of K into the L2 cache; nothing without groups."""
    if shape.group_size is None:
        return
    operands = [ref for ref in (scale, offset) if ref is not None]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(operands), SPLAT, SPLAT))
    def inline(_, scale, *args):
        *offset, k_slice, first_row = args
        threads.prefetch_groups(shape, scale, offset[0] if offset else None, scalar_of(k_slice), scalar_of(first_row))

    inline(*operands, jnp.int32(k_slice), jnp.int32(first_row))


def _finish_twin(shape: WeightOnlyShape, sums, bias, out, first_row) -> None:
    by_warp = sums[...].reshape(-1, shape.row_tiles, WARPS, TILE_ROWS, shape.width)
    total = jnp.sum(by_warp, axis=(0, 2)).reshape(shape.tiling.rows, shape.width)
    if bias is not None:
        total += bias[...][_rows_of_tile(shape, first_row)][:, None]
    out[:, pl.ds(first_row, shape.tiling.rows)] = total.T[: shape.m].astype(shape.dtype)


@with_twin(_finish_twin)
def finish(shape: WeightOnlyShape, sums, bias, out, first_row: Int[Array, ""]) -> None:
    """Adds up the warps' sums and the bias, and stores a tile; see `threads.finish`."""
    operands = [ref for ref in (bias,) if ref is not None]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (2 + len(operands)), SPLAT))
    def inline(_, sums, out, *args):
        *bias, first_row = args
        threads.finish(shape, sums, bias[0] if bias else None, out, scalar_of(first_row))

    inline(sums, out, *operands, jnp.int32(first_row))


def _rows_of_sums(shape: WeightOnlyShape) -> list[int]:
    with_x_sums = shape.offset and shape.group_size is None
    return [shape.sums_rows, _X_SUMS_ROWS] if with_x_sums else [shape.sums_rows]


def _sums_type(shape: WeightOnlyShape) -> list[plgpu.ShapeDtypeStruct]:
    return [
        plgpu.ShapeDtypeStruct((rows, shape.width), jnp.float32, layout=ACCUMULATOR) for rows in _rows_of_sums(shape)
    ]


def _arrays(shape: WeightOnlyShape, sums) -> list[Fragment]:
    return [
        as_array(numbers, (rows, shape.width), ACCUMULATOR)
        for numbers, rows in zip(sums, _rows_of_sums(shape), strict=False)
    ]


# Helpers of the twins.


def _rows_of_tile(shape: WeightOnlyShape, first_row: Int[Array, ""]) -> Int[Array, " rows"]:
    """Rows of the weights; beyond n the last one."""
    return jnp.minimum(first_row + lax.iota(jnp.int32, shape.tiling.rows), shape.n - 1)


def _terms_of_tile(shape: WeightOnlyShape, terms, first_row: Int[Array, ""]) -> Float[Array, "rows groups"]:
    return terms[...][_rows_of_tile(shape, first_row)]


def _dot(a: Float[Array, "rows k"], b: Float[Array, "width k"]) -> Float[Array, "rows width"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
