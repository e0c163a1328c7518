"""The weight ring: slots of shared memory that a producer warpgroup keeps filling with all weights of all layers.

A load brings some of the weights of a tile of 32 output rows, for each consumer warpgroup its share: `WeightKind` says
which. The loads depend on nothing that is computed, so the producer runs ahead across products and layers, also while
blocks wait for each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.fragments import pinned
from bipolar_jax.kernels.sm90.core.watchdog import trap_if_fewer_multiprocessors, wait_or_trap
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import Layers, LayersShape, Product
from bipolar_jax.kernels.sm90.decode_step.cooperative.timeline import Timeline


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductWeights:
    """Weights of one of the four products, of every layer.

    Attributes:
      words: bit planes, uint32 [layers, planes, n, words]; or prepared weights, uint32 [layers, parts, stages, bits,
        WORDS_PER_VECTOR].
      group_terms: of prepared weights with groups, uint32 [layers, parts, stages, vectors, vector_words]; else None.
      code_sums, scale, offset, bias, number_sums: of the columns, flat [layers * n]; None if there is none.
    """

    words: Any
    group_terms: Any
    code_sums: Any
    scale: Any
    offset: Any = None
    bias: Any = None
    number_sums: Any = None

    @property
    def of_columns(self) -> ProductWeights:
        """Without the weights themselves."""
        return dataclasses.replace(self, words=None, group_terms=None)


class WeightKind(Protocol):
    """How weights and tokens lie in shared memory, and how they are multiplied."""

    @property
    def copies(self) -> int:
        """TMA copies of a load."""

    @property
    def slot_types(self) -> Any:
        """Scratch specifications of the ring's slots."""

    @property
    def operand_type(self) -> Any:
        """The scratch specification of the token."""

    @property
    def sums_type(self) -> Any:
        """The scratch specification of a product's sums."""

    def loads_per_tile(self, product: Product) -> int:
        """Loads of a tile."""

    def load_tile(self, load: Callable, slots, weights: ProductWeights, product: Product, layer, tile, block, carry):
        """All loads of one tile of a block, in order.

        Args:
          load: load(copy, carry) waits for the next slot, and calls copy(slot, barrier).
          slots: of the ring.
          weights: refs in memory.
          layer: of the model.
          carry: of `load`.
        """

    def of_warpgroup(self, slots, slot, warpgroup) -> Any:
        """A warpgroup's share of a slot."""

    def store_token(
        self,
        operand,
        code_sums,
        warpgroup: Int[Array, ""],
        k_slices: Sequence[Float[Array, "1024"]],
        starts: Sequence[Int[Array, ""]],
        k: int,
        half_steps: Float[Array, ""],
        middle: Float[Array, ""],
        text: Int[Array, ""] | int = 0,
    ) -> None:
        """Encodes a warpgroup's K slices as `bit_planes.store_bit_planes` says, and stores them for `multiply`.

        When it returns, the warpgroup may multiply them. `text` says whose they are.
        """

    def multiply(self, ring: WeightRing, layer, name: str, warpgroup, operand, sums) -> None:
        """Adds up this warpgroup's products of every tile of the block.

        Args:
          layer: counted from the first that is computed.
          operand: the token.
          sums: of `sums_type`, [warpgroups, ..., rows], in the order of halves and rows.
        """

    def clear_sums(self, sums, warpgroup) -> None:
        """What a warpgroup does to its sums before the first product."""

    def take_sums(self, sums, start, count, text: Int[Array, ""] | int = 0) -> Num[Array, "128"]:
        """Sums over all warpgroups of 128 rows of a text from `start` on; those from `count` on mean nothing."""


@dataclasses.dataclass(frozen=True)
class WeightRing:
    """The slots, and the order in which weights pass through them.

    Attributes:
      shape: of the layers.
      kind: of the weights.
      names: of the products that are computed, in order.
      block: which block of the grid has this ring.
      slots: shared memory, as `kind` says.
      arrived: barriers [w_slots], one arrival for each copy of a load.
      emptied: barriers [w_slots], one arrival for each warpgroup.
      timeline: where waits for loads are counted, of the phase.
    """

    shape: LayersShape
    kind: WeightKind
    names: Sequence[str]
    block: Any
    slots: Any
    arrived: Any
    emptied: Any
    timeline: Timeline | None = None

    def first_load(self, layer, name: str, tile) -> Int[Array, ""]:
        """The index of a tile's first load; layers are counted from the first that is computed."""
        loads = {name: self._loads(name) for name in self.names}
        before = sum(loads[other] for other in self.names[: self.names.index(name)])
        # Pinned: else each product keeps a count of its own in a register.
        return pinned(layer) * sum(loads.values()) + before + tile * (loads[name] // self.shape.products[name].tiles)

    def wait(self, load, warpgroup):
        """Waits for a load; returns the warpgroup's share of it."""
        slot = lax.rem(load, self.shape.w_slots)
        with nullcontext() if self.timeline is None else self.timeline.waiting():
            plgpu.barrier_wait(self.arrived.at[slot])
        return self.kind.of_warpgroup(self.slots, slot, warpgroup)

    def release(self, load) -> None:
        """The warpgroup no longer reads what it waited for."""
        plgpu.barrier_arrive(self.emptied.at[lax.rem(load, self.shape.w_slots)])

    def fill(self, weights: dict[str, ProductWeights], layers: Layers) -> None:
        """Loads all weights as slots become free, and waits until the last slots are free.

        This bounds every wait of the kernel. The consumers may wait for other blocks without a limit, or for a load:
        each such wait comes before they empty slots that the producer waits for, and that wait has a limit.
        """
        trap_if_fewer_multiprocessors(self.shape.blocks)

        def load_product(name: str, layer, carry):
            product = self.shape.products[name]

            def load_tile(tile, carry):
                model_layer = layers.first + layer
                return self.kind.load_tile(
                    self._load, self.slots, weights[name], product, model_layer, tile, self.block, carry
                )

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

    def _load(self, copy: Callable, carry):
        """Makes the copies of one load. The carry is the number of loads so far, and the next slot."""
        count, slot = carry

        @when(count >= self.shape.w_slots)
        def _():
            self._wait_emptied(slot)

        copy(slot, self.arrived.at[slot])
        return count + 1, jnp.where(slot + 1 == self.shape.w_slots, 0, slot + 1)

    def _loads(self, name: str) -> int:
        product = self.shape.products[name]
        return product.tiles * self.kind.loads_per_tile(product)
