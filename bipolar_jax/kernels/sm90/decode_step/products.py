"""A product of a layer with the token: the integer sums, and the terms that complete them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx, wgmma
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, VECTOR, lane_and_warp, pinned, repeat, scalar_of, word_of
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import HEAD_DIM, TILE, WARPGROUPS, LayersShape, Product
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import reduce_block
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import load_vector, prefetch
from bipolar_jax.kernels.sm90.decode_step.quantize_token import TokenGrid
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights, WeightRing


def multiply(shape: LayersShape, ring: WeightRing, layer, name: str, warpgroup, x_tiles, sums) -> None:
    """Stores this warpgroup's sums of every tile of the block in shared memory.

    A loop over all planes and K slices multiplies one or two planes at a time. Unrolled code for more of them does not
    fit the instruction cache, and would release slots later.

    Args:
      layer: counted from the first that is computed.
      x_tiles: planes of the token's K slices, uint32 [warpgroups, K slices, 8, 32].
      sums: int32 [warpgroups, rows].
    """
    product, weights = shape.products[name], shape.w_format.plane_weights
    planes = 1 if len(weights) % 2 else 2

    def add_planes(index, first_load, total):
        load = index * planes
        k_slice, plane = lax.div(load, len(weights)), lax.rem(load, len(weights))
        # Wait for all planes before the first wgmma: a wait is a loop, and ptxas serializes wgmma in flight over loops.
        tiles = [ring.wait(first_load + load + i, warpgroup) for i in range(planes)]
        accumulators = [
            wgmma.start(
                (wgmma.ROWS_PER_INSTRUCTION, 8),
                tile,
                x_tiles.at[warpgroup, k_slice],
                "planes",
                block_rows=TILE,
            )
            for tile in tiles
        ]
        accumulators = [wgmma.settle(acc) for acc in accumulators]
        for i in range(planes):
            ring.release(first_load + load + i)
        # Two adjacent planes have equal weights (ternary), or 1 and 2 times 2^plane.
        combined = sum(acc * weight for acc, weight in zip(accumulators, weights, strict=False))
        return total + combined * lax.shift_left(jnp.int32(1), plane)

    def multiply_tile(tile):
        first_load = ring.first_load(layer, name, tile)
        total = lax.fori_loop(
            0,
            pinned(product.k_slices * len(weights) // planes),
            lambda index, total: add_planes(index, first_load, total),
            wgmma.zeros(wgmma.ROWS_PER_INSTRUCTION, 8),
        )
        store_plane_sums(sums.at[warpgroup], total, shape.a_format.plane_weights, tile * TILE)

    repeat(product.tiles, multiply_tile)


def _store_plane_sums_twin(target, accumulator, weights, start):
    target[pl.ds(start, TILE)] = sum(accumulator[:TILE, plane] * weight for plane, weight in enumerate(weights))


@with_twin(_store_plane_sums_twin)
def store_plane_sums(target, accumulator: Int[Array, "64 8"], weights: Sequence[int], start: Int[Array, ""]) -> None:
    """target[start + r] = sum over the token's planes p of weights[p] * accumulator[r, p], for 32 rows r.

    Args:
      target: int32 in shared memory, flat.
      accumulator: in the layout wgmma.ACCUMULATOR; the last 32 of the 64 rows are ignored.
      weights: of the token's planes, at most 8; further columns of the accumulator are ignored.
    """
    columns = [*weights, *[0] * (8 - len(weights))]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, wgmma.ACCUMULATOR))
    def inline(_, target, start, accumulator):
        lane, warp = lane_and_warp()
        pair = ptx.bits_of(lane, 3)
        # A thread holds columns 2 pair and 2 pair + 1 of rows lane / 4 and lane / 4 + 8 of its warp's 16.
        weights = [_entry(columns[i::2], pair) for i in range(2)]
        totals = [
            ptx.plus(*(ptx.times(word_of(number), w) for number, w in zip(row, weights, strict=True)))
            for row in accumulator.registers.reshape(2, 2)
        ]
        for distance in (1, 2):
            totals = [ptx.plus(total, ptx.exchange(total, distance)) for total in totals]
        row = ptx.plus(ptx.plus(ptx.times(warp, 16), ptx.shift_right(lane, 2)), scalar_of(start))
        with ptx.when(ptx.bits_of(ptx.equal(pair, 0), ptx.less(warp, TILE // 16))):
            pointer = ptx.advance_far(ptx.pointer(target, ptx.SHARED), row, 4)
            ptx.store(pointer, totals[:1])
            ptx.store(ptx.advance(pointer, 32), totals[1:])

    inline(target, jnp.int32(start), accumulator)


def _entry(numbers: Sequence[int], index: Value) -> Value:
    """numbers[index], by selects."""
    value = ptx.int32(numbers[0])
    for i, number in enumerate(numbers[1:], 1):
        value = ptx.choose(ptx.equal(index, i), ptx.int32(number), value)
    return value


def column_terms(shape: LayersShape, weights: ProductWeights, layer, name: str, block) -> list[list[ProductWeights]]:
    """Terms of this block's rows, by half and chunk: `ProductWeights` of vectors, without the words."""

    def load(start, count):
        terms = dataclasses.replace(weights, words=None)
        return jax.tree.map(lambda ref: load_vector(ref, start, start + count), terms)

    product = shape.products[name]
    return [
        [load(*_term_range(product, layer, block, half, chunk)) for chunk in range(product.chunks)]
        for half in range(product.halves)
    ]


def prefetch_terms(shape: LayersShape, weights: ProductWeights, layer, name: str, block) -> None:
    """Prefetches to the L2 cache what `column_terms` will load."""
    product = shape.products[name]
    for half in range(product.halves):
        start, _ = _term_range(product, layer, block, half, 0)
        count = jnp.minimum(product.rows, product.half_size - block * product.rows)
        for ref in jax.tree.leaves(dataclasses.replace(weights, words=None)):
            prefetch(ref, start, count)


def _term_range(product: Product, layer, block, half: int, chunk: int):
    """Where the terms of a chunk begin in the flat arrays of all layers, and how many there are."""
    first, count = chunk_rows(product, block, chunk)
    return layer * product.n + half * product.half_size + first, count


def chunk_rows(product: Product, block, chunk: int):
    """First row of a chunk of this block within a half of the output, and how many rows there are; may be negative."""
    first = block * product.rows + chunk * HEAD_DIM
    return first, jnp.minimum(product.rows - chunk * HEAD_DIM, product.half_size - first)


def finish(
    shape: LayersShape, name: str, terms: ProductWeights, shared, grid: TokenGrid, half: int, chunk: int
) -> Float[Array, "128"]:
    """A chunk of a half of this block's output: y = s_x (s_w t + o_w X) + bias, as in `arithmetic.epilogue`."""
    product, recovery = shape.products[name], shape.recovery(name)
    start = half * product.rows + chunk * HEAD_DIM
    total = sum(
        plgpu.load(shared.product_sums.at[warpgroup, pl.ds(start, HEAD_DIM)], layout=VECTOR, optimized=False)
        for warpgroup in range(WARPGROUPS)
    )
    code_sums = reduce_block(shared.code_sums, "sum")
    total = total * recovery.product_weight + recovery.row_term(code_sums)
    total = total + recovery.column_weight(grid.zero_code) * recovery.column_value_sums(terms.code_sums)
    y = total.astype(jnp.float32) * terms.scale
    if terms.offset is not None:
        y = y + terms.offset * recovery.token_value_sums(code_sums, grid.zero_code).astype(jnp.float32)
    y = y * (grid.scale * recovery.scale_factor)
    return y if terms.bias is None else y + terms.bias
