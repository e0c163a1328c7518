"""The layers' products with a token: the sums, and what completes them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.fragments import VECTOR, pinned, repeat
from bipolar_jax.kernels.sm90.decode_step.config import HEAD_DIM, TILE, WARPGROUPS, LayersShape, Product
from bipolar_jax.kernels.sm90.decode_step.exchange import collect, write_products
from bipolar_jax.kernels.sm90.decode_step.quantize_token import Grid
from bipolar_jax.kernels.sm90.decode_step.vectors import load_vector, prefetch_vector
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights, WeightRing


def multiply(shape: LayersShape, ring: WeightRing, layer, name: str, me, x_tiles, products, *, emulate: bool) -> None:
    """Leaves this warpgroup's sums of every tile in shared memory, int32 [warpgroups, rows].

    One or two planes are multiplied at a time, by a loop over all planes and parts of K: instructions for more of them,
    side by side, do not fit the cache of instructions, and slots would be given back later.

    Args:
      layer: counted from the first that is computed.
      x_tiles: planes of the token's parts, uint32 [warpgroups, parts, 8, 32].
      products: where the sums go.
    """
    product, weights = shape.products[name], shape.w_format.plane_weights
    at_once = 1 if len(weights) % 2 else 2

    def add_planes(index, first, total):
        load = index * at_once
        turn, plane = lax.div(load, len(weights)), lax.rem(load, len(weights))
        # All are there before the first is multiplied: no loop may be among instructions in flight.
        tiles = [ring.wait(first + load + i, me) for i in range(at_once)]
        sums = [
            wgmma.start(
                (wgmma.ROWS_PER_INSTRUCTION, 8),
                tile,
                x_tiles.at[me, turn],
                "planes",
                block_rows=TILE,
            )
            for tile in tiles
        ]
        sums = [wgmma.settle(acc) for acc in sums]
        for i in range(at_once):
            ring.release(first + load + i)
        # Planes beside each other weigh alike (ternary) or 1 and 2, times 2^plane.
        together = sum(acc * weight for acc, weight in zip(sums, weights, strict=False))
        return total + together * lax.shift_left(jnp.int32(1), plane)

    def multiply_tile(tile):
        first = ring.number(layer, name, tile)
        total = lax.fori_loop(
            0,
            pinned(product.turns * len(weights) // at_once),
            lambda index, total: add_planes(index, first, total),
            wgmma.zeros(wgmma.ROWS_PER_INSTRUCTION, 8),
        )
        write_products(products.at[me], total, shape.a_format.plane_weights, tile * TILE, emulate=emulate)

    repeat(product.tiles, multiply_tile)


def column_terms(shape: LayersShape, weights: ProductWeights, layer, name: str, block, *, emulate: bool):
    """Terms of this block's rows, by half and chunk of 128: `ProductWeights` of vectors, the words None."""

    def load(start, count):
        terms = dataclasses.replace(weights, words=None)
        return jax.tree.map(lambda ref: load_vector(ref, start, start + count, emulate=emulate), terms)

    product = shape.products[name]
    return [
        [load(*_terms_of(product, layer, block, half, chunk)) for chunk in range(product.chunks)]
        for half in range(product.halves)
    ]


def prefetch_terms(shape: LayersShape, weights: ProductWeights, layer, name: str, block, *, emulate: bool) -> None:
    """Has the L2 cache load what `column_terms` will read."""
    product = shape.products[name]
    for half in range(product.halves):
        start, _ = _terms_of(product, layer, block, half, 0)
        count = jnp.minimum(product.rows, product.size - block * product.rows)
        for ref in jax.tree.leaves(dataclasses.replace(weights, words=None)):
            prefetch_vector(ref, start, count, emulate=emulate)


def _terms_of(product: Product, layer, block, half: int, chunk: int):
    """Where a chunk of a half of this block's rows begins among all layers' columns, and how many count."""
    first, count = rows_of(product, block, chunk)
    return layer * product.n + half * product.size + first, count


def rows_of(product: Product, block, chunk: int):
    """Where a chunk of 128 rows of a half of this block's output begins, and how many count."""
    first = block * product.rows + chunk * HEAD_DIM
    return first, jnp.minimum(product.rows - chunk * HEAD_DIM, product.size - first)


def finish(shape: LayersShape, name: str, terms: ProductWeights, shared, grid: Grid, half: int, chunk: int):
    """A chunk of 128 rows of a half of this block's output, float32.

    y = s_x (s_w t + o_w X) + bias, as `kernels.sm90.epilogue`.
    """
    product, recovery = shape.products[name], shape.recovery(name)
    at = half * product.rows + chunk * HEAD_DIM
    total = sum(_load(shared.products.at[warpgroup, pl.ds(at, HEAD_DIM)]) for warpgroup in range(WARPGROUPS))
    code_sums = collect(shared.code_sums, "sum", emulate=shared.emulate)
    total = total * recovery.product_weight + recovery.row_term(code_sums)
    total = total + recovery.column_weight(grid.zero_code) * recovery.column_value_sums(terms.code_sums)
    y = total.astype(jnp.float32) * terms.scale
    if terms.offset is not None:
        y = y + terms.offset * recovery.token_value_sums(code_sums, grid.zero_code).astype(jnp.float32)
    y = y * (grid.scale * recovery.scale_factor)
    return y if terms.bias is None else y + terms.bias


def _load(ref) -> Int[Array, "128"]:
    return plgpu.load(ref, layout=VECTOR, optimized=False)
