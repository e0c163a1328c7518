"""The layers' products with a token: the ring that runs ahead over all of them, the sums, and what completes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90 import tensor_core
from bipolar_jax.kernels.sm90.layers.exchange import collect, write_products
from bipolar_jax.kernels.sm90.layers.registers import VECTOR, pinned
from bipolar_jax.kernels.sm90.layers.shape import HEAD_DIM, TILE, WARPGROUPS, LayersShape, Product
from bipolar_jax.kernels.sm90.layers.token import Grid
from bipolar_jax.kernels.sm90.layers.vectors import load_vector
from bipolar_jax.kernels.sm90.tensor_core import WORDS_PER_ROW


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductWeights:
    """Weights of one of the four products of every layer.

    Attributes:
      words: bit planes, rows of words, uint32 [layers, planes, n, words].
      code_sums, scale, offset, bias: of the columns, flat [layers * n]; None for what there is not.
    """

    words: Any
    code_sums: Any
    scale: Any
    offset: Any = None
    bias: Any = None


class WeightRing:
    """Slots of shared memory, of one warpgroup, through which all weights go in the order in which they are needed.

    A slot has one plane of a tile of 32 columns and 1024 elements of K. What is loaded depends on nothing that is
    computed, so that it runs ahead over products and layers, while blocks wait for each other too.
    """

    def __init__(
        self,
        shape: LayersShape,
        weights: dict[str, ProductWeights],
        names,
        layers: range,
        me,
        block,
        ring,
        arrived,
        *,
        emulate: bool,
    ):
        """Starts the first loads.

        Args:
          shape: of the layers.
          weights: refs.
          names: of the products that are computed, in order.
          layers: which are computed.
          me, block: which warpgroup and block.
          ring: shared memory, uint32 [warpgroups * slots + 1, 32, 32]; the last is never written.
          arrived: barriers [warpgroups * slots].
        """
        self._first_layer = layers[0]
        self._shape, self._weights, self._names = shape, weights, names
        self._me, self._block, self._ring, self._arrived = me, block, ring, arrived
        self._starts, self._loads = {}, 0
        for name in names:
            self._starts[name] = self._loads
            product = shape.products[name]
            self._loads += product.tiles * product.turns * shape.w_format.bits
        self._total = len(layers) * self._loads
        repeat(shape.w_slots, self._load, emulate=emulate)

    def number(self, layer, name: str, tile, turn) -> Int[Array, ""]:
        """The count of loads before a part of a tile."""
        product = self._shape.products[name]
        within = (tile * product.turns + turn) * self._shape.w_format.bits
        return layer * self._loads + self._starts[name] + within

    def slot(self, number):
        """Waits for a load; gives [32, 32 words], after which there is memory to be read."""
        slot = lax.rem(number, self._shape.w_slots)
        plgpu.barrier_wait(self._arrived.at[self._me * self._shape.w_slots + slot])
        return self._at(slot)

    def refill(self, number) -> None:
        """Loads what comes next into the slot of a load that is done with."""
        self._load(number + self._shape.w_slots)

    def _at(self, slot):
        return self._ring.at[self._me * self._shape.w_slots + slot]

    def _load(self, number) -> None:
        shape, bits = self._shape, self._shape.w_format.bits
        layer, within = lax.div(number, self._loads), lax.rem(number, self._loads)
        slot = lax.rem(number, shape.w_slots)
        for name in self._names:
            product, first = shape.products[name], self._starts[name]
            count = product.tiles * product.turns * bits

            @pl.when((number < self._total) & (within >= first) & (within < first + count))
            def _(name=name, product=product, first=first):
                index = within - first
                part, plane = lax.div(index, bits), lax.rem(index, bits)
                tile, turn = lax.div(part, product.turns), lax.rem(part, product.turns)
                half, tile = lax.div(tile, product.rows // TILE), lax.rem(tile, product.rows // TILE)
                row = half * product.size + self._block * product.rows + tile * TILE
                word = (self._me + turn * WARPGROUPS) * WORDS_PER_ROW
                # [32, 32 words]
                plgpu.copy_gmem_to_smem(
                    self._weights[name].words.at[
                        self._first_layer + layer, plane, pl.ds(row, TILE), pl.ds(word, WORDS_PER_ROW)
                    ],
                    self._at(slot),
                    self._arrived.at[self._me * shape.w_slots + slot],
                )


def multiply(shape: LayersShape, ring: WeightRing, layer, name: str, me, x_tiles, products, *, emulate: bool) -> None:
    """Leaves this warpgroup's sums of every tile in shared memory, int32 [warpgroups, rows].

    One or two planes are multiplied at a time, by a loop over all planes and parts of K: instructions for more of them,
    side by side, do not fit the cache of instructions, where waiting for memory is dearer than waiting for sums.

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
        tiles = [ring.slot(first + load + i) for i in range(at_once)]
        sums = [
            tensor_core.start(
                (tensor_core.ROWS_PER_INSTRUCTION, 8),
                tile,
                x_tiles.at[me, turn],
                "planes",
                block_rows=TILE,
                emulate=emulate,
            )
            for tile in tiles
        ]
        sums = [tensor_core.settle(acc, emulate=emulate) for acc in sums]
        repeat(at_once, lambda i: ring.refill(first + load + i), emulate=emulate)
        # Planes beside each other weigh alike (ternary) or 1 and 2, times 2^plane.
        together = sum(acc * weight for acc, weight in zip(sums, weights, strict=False))
        return total + together * lax.shift_left(jnp.int32(1), plane)

    def multiply_tile(tile):
        first = ring.number(layer, name, tile, 0)
        total = lax.fori_loop(
            0,
            pinned(product.turns * len(weights) // at_once, emulate=emulate),
            lambda index, total: add_planes(index, first, total),
            tensor_core.zeros(tensor_core.ROWS_PER_INSTRUCTION, 8),
        )
        write_products(products.at[me], total, shape.a_format.plane_weights, tile * TILE, emulate=emulate)

    repeat(product.tiles, multiply_tile, emulate=emulate)


def repeat(count: int, body: Callable[[Int[Array, ""]], None], *, emulate: bool) -> None:
    """body(0), body(1), ... as a loop that the compiler cannot unroll, not knowing how long it is."""

    def step(index, carry):
        body(index)
        return carry

    lax.fori_loop(0, pinned(count, emulate=emulate), step, ())


def column_terms(shape: LayersShape, weights: ProductWeights, layer, name: str, block, *, emulate: bool):
    """Terms of this block's rows, by half and chunk of 128: `ProductWeights` of vectors, the words None."""
    product = shape.products[name]

    def load(half: int, chunk: int):
        first, count = rows_of(product, block, chunk)
        start = layer * product.n + half * product.size + first
        terms = dataclasses.replace(weights, words=None)
        return jax.tree.map(lambda ref: load_vector(ref, start, start + count, emulate=emulate), terms)

    return [[load(half, chunk) for chunk in range(product.chunks)] for half in range(product.halves)]


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
