"""The way of all weights through shared memory: a ring of slots that a warpgroup of its own keeps filling.

A slot has one plane of a tile of 32 columns and, for each of the other warpgroups, 1024 elements of K. What is loaded
depends on nothing that is computed, so that it runs ahead over products and layers, while blocks wait for each other
too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core.fragments import pinned
from bipolar_jax.kernels.sm90.core.wgmma import WORDS_PER_ROW
from bipolar_jax.kernels.sm90.decode_step.config import TILE, WARPGROUPS, LayersShape


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


@dataclasses.dataclass(frozen=True)
class WeightRing:
    """The slots, and the order in which weights go through them.

    Attributes:
      shape: of the layers.
      names: of the products that are computed, in order.
      slots: shared memory, uint32 [w_slots * warpgroups + 1, 32, 32]; the last is never written.
      arrived: barriers [w_slots], of a load for each warpgroup.
      emptied: barriers [w_slots], of each warpgroup.
    """

    shape: LayersShape
    names: Sequence[str]
    slots: Any
    arrived: Any
    emptied: Any

    def number(self, layer, name: str, tile) -> Int[Array, ""]:
        """The count of slots filled before a tile; layers are counted from the first that is computed."""
        loads = {name: self._loads(name) for name in self.names}
        before = sum(loads[other] for other in self.names[: self.names.index(name)])
        return layer * sum(loads.values()) + before + tile * (loads[name] // self.shape.products[name].tiles)

    def wait(self, number, me):
        """Waits for the number-th filling; gives the warpgroup's [32, 32 words], behind which there is memory."""
        slot = lax.rem(number, self.shape.w_slots)
        plgpu.barrier_wait(self.arrived.at[slot])
        return self.slots.at[slot * WARPGROUPS + me]

    def release(self, number) -> None:
        """What was waited for is done with."""
        plgpu.barrier_arrive(self.emptied.at[lax.rem(number, self.shape.w_slots)])

    def fill(self, weights: dict[str, ProductWeights], layers: range, block, *, emulate: bool) -> None:
        """Loads everything, as slots become free, and waits until the last ones are."""

        def load_product(name: str, layer, carry):
            product, bits = self.shape.products[name], self.shape.w_format.bits

            def load_tile(tile, carry):
                half, tile = lax.div(tile, product.rows // TILE), lax.rem(tile, product.rows // TILE)
                within = block * product.rows + tile * TILE
                # What is beyond a half is not the next one's: it comes as zeros, and from no memory.
                row = jnp.where(within < product.size, half * product.size + within, product.n)

                def load_plane(index, carry):
                    turn, plane = lax.div(index, bits), lax.rem(index, bits)
                    source = weights[name].words.at[layers[0] + layer, plane, pl.ds(row, TILE)]
                    return self._load(source, turn * WARPGROUPS * WORDS_PER_ROW, carry)

                return lax.fori_loop(0, pinned(product.turns * bits), load_plane, carry)

            return lax.fori_loop(0, pinned(product.tiles), load_tile, carry)

        def load_layer(layer, carry):
            for name in self.names:
                carry = load_product(name, layer, carry)
            return carry

        lax.fori_loop(0, len(layers), load_layer, (jnp.int32(0), jnp.int32(0)))
        for slot in range(min(self.shape.w_slots, len(layers) * sum(map(self._loads, self.names)))):
            plgpu.barrier_wait(self.emptied.at[slot])

    def _load(self, rows, word, carry):
        """Loads a plane of a tile from a word on: the carry is how many were loaded, and where the next goes."""
        count, slot = carry

        @pl.when(count >= self.shape.w_slots)
        def _():
            plgpu.barrier_wait(self.emptied.at[slot])

        for warpgroup in range(WARPGROUPS):
            # [32, 32 words]; what is beyond K, and rows beyond the last, come as zeros.
            plgpu.copy_gmem_to_smem(
                rows.at[:, pl.ds(word + warpgroup * WORDS_PER_ROW, WORDS_PER_ROW)],
                self.slots.at[slot * WARPGROUPS + warpgroup],
                self.arrived.at[slot],
            )
        return count + 1, jnp.where(slot + 1 == self.shape.w_slots, 0, slot + 1)

    def _loads(self, name: str) -> int:
        product = self.shape.products[name]
        return product.tiles * product.turns * self.shape.w_format.bits
