"""The weight ring: slots of shared memory that a producer warpgroup keeps filling with all weights of all layers.

A slot holds one bit plane of a tile of 32 output rows: a K slice for each consumer warpgroup. The loads depend on
nothing that is computed, so the producer runs ahead across products and layers, also while blocks wait for each other.
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
from bipolar_jax.kernels.sm90.core.watchdog import trap_if_fewer_multiprocessors, wait_or_trap
from bipolar_jax.kernels.sm90.core.wgmma import WORDS_PER_ROW
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import TILE, WARPGROUPS, Layers, LayersShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductWeights:
    """Weights of one of the four products, of every layer.

    Attributes:
      words: bit planes, uint32 [layers, planes, n, words].
      code_sums, scale, offset, bias: of the columns, flat [layers * n]; None if there is none.
    """

    words: Any
    code_sums: Any
    scale: Any
    offset: Any = None
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class WeightRing:
    """The slots, and the order in which weights pass through them.

    Attributes:
      shape: of the layers.
      names: of the products that are computed, in order.
      slots: shared memory, uint32 [w_slots * warpgroups + 1, 32, 32]; the last entry is never written.
      arrived: barriers [w_slots], one arrival for each warpgroup's load.
      emptied: barriers [w_slots], one arrival for each warpgroup.
    """

    shape: LayersShape
    names: Sequence[str]
    slots: Any
    arrived: Any
    emptied: Any

    def first_load(self, layer, name: str, tile) -> Int[Array, ""]:
        """The index of a tile's first load; layers are counted from the first that is computed."""
        loads = {name: self._loads(name) for name in self.names}
        before = sum(loads[other] for other in self.names[: self.names.index(name)])
        return layer * sum(loads.values()) + before + tile * (loads[name] // self.shape.products[name].tiles)

    def wait(self, load, warpgroup):
        """Waits for a load; returns the warpgroup's K slice of it, [32, 32 words], behind which there is memory."""
        slot = lax.rem(load, self.shape.w_slots)
        plgpu.barrier_wait(self.arrived.at[slot])
        return self.slots.at[slot * WARPGROUPS + warpgroup]

    def release(self, load) -> None:
        """The warpgroup no longer reads what it waited for."""
        plgpu.barrier_arrive(self.emptied.at[lax.rem(load, self.shape.w_slots)])

    def fill(self, weights: dict[str, ProductWeights], layers: Layers, block) -> None:
        """Loads all weights as slots become free, and waits until the last slots are free.

        This bounds every wait of the kernel. The consumers may wait for other blocks without a limit, or for a load:
        each such wait comes before they empty slots that the producer waits for, and that wait has a limit.
        """
        trap_if_fewer_multiprocessors(self.shape.blocks)

        def load_product(name: str, layer, carry):
            product, bits = self.shape.products[name], self.shape.w_format.bits

            def load_tile(tile, carry):
                half, tile = lax.div(tile, product.rows // TILE), lax.rem(tile, product.rows // TILE)
                row_in_half = block * product.rows + tile * TILE
                # Rows beyond a half must not be the next half's: from row n on TMA fills in zeros and reads nothing.
                row = jnp.where(row_in_half < product.half_size, half * product.half_size + row_in_half, product.n)

                def load_plane(index, carry):
                    k_slice, plane = lax.div(index, bits), lax.rem(index, bits)
                    source = weights[name].words.at[layers.first + layer, plane, pl.ds(row, TILE)]
                    return self._load(source, k_slice * WARPGROUPS * WORDS_PER_ROW, carry)

                return lax.fori_loop(0, pinned(product.k_slices * bits), load_plane, carry)

            return lax.fori_loop(0, pinned(product.tiles), load_tile, carry)

        def load_layer(layer, carry):
            for name in self.names:
                carry = load_product(name, layer, carry)
            return carry

        lax.fori_loop(0, layers.count, load_layer, (jnp.int32(0), jnp.int32(0)))
        for slot in range(min(self.shape.w_slots, layers.count * sum(map(self._loads, self.names)))):
            self._wait_emptied(slot)

    def _wait_emptied(self, slot) -> None:
        wait_or_trap(self.emptied.at[slot], self.shape.wait_limit_ms)

    def _load(self, plane_rows, first_word, carry):
        """Loads a plane of a tile, from a word on. The carry is the number of loads so far, and the next slot."""
        count, slot = carry

        @pl.when(count >= self.shape.w_slots)
        def _():
            self._wait_emptied(slot)

        for warpgroup in range(WARPGROUPS):
            # [32, 32 words]; zeros beyond K and beyond the last row.
            plgpu.copy_gmem_to_smem(
                plane_rows.at[:, pl.ds(first_word + warpgroup * WORDS_PER_ROW, WORDS_PER_ROW)],
                self.slots.at[slot * WARPGROUPS + warpgroup],
                self.arrived.at[slot],
            )
        return count + 1, jnp.where(slot + 1 == self.shape.w_slots, 0, slot + 1)

    def _loads(self, name: str) -> int:
        product = self.shape.products[name]
        return product.tiles * product.k_slices * self.shape.w_format.bits
