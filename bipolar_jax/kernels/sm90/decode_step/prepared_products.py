"""Products of prepared weights with `mma` of bytes: `WeightKind` of prepared weights.

A load is some stages of a part (32 columns of the weights) for each warpgroup, out of the K slice of the token that it
has quantized. A warp expands the stages that are its own and multiplies them; its sums stay in registers over all of K,
and the block's warps add theirs in shared memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from bipolar_jax.kernels.sm90.core.fragments import (
    pinned,
    repeat,
)
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.decode_step import part_sums
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import (
    STAGES_PER_SLICE,
    TILE,
    WARPGROUPS,
    LayersShape,
    Product,
)
from bipolar_jax.kernels.sm90.decode_step.token_bytes import (
    SLICE_WORDS,
    ByteLayout,
    TokenLayout,
    store_codes,
)
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights, WeightRing
from bipolar_jax.kernels.sm90.prepared_weights.expansion import Expansion
from bipolar_jax.packing.fields import WORDS_PER_VECTOR


@dataclasses.dataclass(frozen=True)
class PreparedKind:
    """See `weight_ring.WeightKind`.

    Slots are uint32 [w_slots, warpgroups * stages, bits, WORDS_PER_VECTOR] and, of groups, [w_slots, warpgroups *
    stages, vectors, vector_words]; the token is uint32 [K slices, SLICE_WORDS].
    """

    shape: LayersShape

    @property
    def copies(self) -> int:
        return len(self._shares) * (2 if self.shape.prepared.chunks else 1)

    @property
    def slot_types(self) -> Any:
        shape = self.shape
        slots, chunks = (shape.w_slots, WARPGROUPS * shape.stages_per_load), shape.prepared.chunks
        words = plgpu.SMEM((*slots, shape.w_format.bits, WORDS_PER_VECTOR), jnp.uint32)
        return words, plgpu.SMEM((*slots, *shape.prepared.terms_shape), jnp.uint32) if chunks else None

    @property
    def sums_type(self) -> Any:
        return plgpu.SMEM((WARPGROUPS, self.shape.max_rows), jnp.int32)

    @property
    def operand_type(self) -> Any:
        return plgpu.SMEM((self.shape.token_slices, SLICE_WORDS), jnp.uint32)

    @property
    def _loads_per_slice(self) -> int:
        return STAGES_PER_SLICE // self.shape.stages_per_load

    @property
    def _shares(self) -> list[tuple[int, int, int]]:
        """What each copy of a load brings: first stage in memory and in the slot, and how many.

        Whole K slices of all warpgroups follow each other in memory. Each copy costs the producer a barrier and some
        twenty instructions in a row.
        """
        stages = self.shape.stages_per_load
        if stages == STAGES_PER_SLICE:
            return [(0, 0, WARPGROUPS * stages)]
        return [(warpgroup * STAGES_PER_SLICE, warpgroup * stages, stages) for warpgroup in range(WARPGROUPS)]

    def loads_per_tile(self, product: Product) -> int:
        return product.k_slices * self._loads_per_slice

    def _slice_and_part(self, index, block) -> tuple[Any, Any]:
        """Which K slice of a warpgroup the index-th load of a tile is out of, and which of its loads.

        Blocks begin a slice of 8-bit weights at different loads: what they read at the same time would else lie whole
        multiples of 128 KB apart, of which memory may serve fewer at once.
        """
        first = block if self.shape.stages_per_load == 1 else 0
        return lax.div(index, self._loads_per_slice), (index + first) & (self._loads_per_slice - 1)

    def load_tile(self, load: Callable, slots, weights: ProductWeights, product: Product, layer, tile, block, carry):
        part, stages = block * product.tiles + tile, self.shape.stages_per_load
        pairs = [
            (source, target)
            for source, target in zip((weights.words, weights.group_terms), slots, strict=True)
            if target is not None
        ]

        def load_stages(index, carry):
            k_slice, part_of_slice = self._slice_and_part(index, block)
            first = k_slice * (WARPGROUPS * STAGES_PER_SLICE) + part_of_slice * stages

            def copy(slot, arrived):
                for start, start_in_slot, count in self._shares:
                    # Zeros beyond K and beyond the last part.
                    own, of_slot = pl.ds(first + start, count), pl.ds(start_in_slot, count)
                    for source, target in pairs:
                        plgpu.copy_gmem_to_smem(source.at[layer, part, own], target.at[slot, of_slot], arrived)

            return load(copy, carry)

        return lax.fori_loop(0, pinned(self.loads_per_tile(product)), load_stages, carry)

    def of_warpgroup(self, slots, slot, warpgroup) -> Any:
        """The warpgroup's words and terms, the latter None without groups."""
        stages = self.shape.stages_per_load
        return [None if ref is None else ref.at[slot, pl.ds(warpgroup * stages, stages)] for ref in slots]

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
        shape, indices = self.shape, [warpgroup + i * WARPGROUPS for i in range(len(k_slices))]
        numbers, text = (k_slices, indices, starts, k, half_steps, middle), None if shape.texts == 1 else text
        store_codes(operand, code_sums, warpgroup, *numbers, shape.a_format, self._token_layout, text)
        synchronize()

    @property
    def _token_layout(self) -> TokenLayout:
        return ByteLayout(self.shape.prepared.order)

    def multiply(self, ring: WeightRing, layer, name: str, warpgroup, operand, sums) -> None:
        product = self.shape.products[name]
        # Sums of halves lie one after the other, of parts without halves 32 rows in a row.
        part_rows, block_stride = (
            (part_sums.BLOCK_ROWS, product.rows) if product.halves > 1 else (TILE, part_sums.BLOCK_ROWS)
        )

        def add_load(index, first_load, total):
            k_slice, part_of_slice = self._slice_and_part(index, ring.block)
            index_of_slice = warpgroup + k_slice * WARPGROUPS
            words, terms = ring.wait(first_load + index, warpgroup)
            total = self.add_stages(
                total,
                words,
                terms,
                operand.at[jnp.minimum(index_of_slice, product.all_k_slices - 1)],
                part_of_slice,
                index_of_slice < product.all_k_slices if product.all_k_slices % WARPGROUPS else None,
            )
            ring.release(first_load + index)
            return total

        def multiply_part(tile):
            first_load = ring.first_load(layer, name, tile)
            total = lax.fori_loop(
                0,
                pinned(self.loads_per_tile(product)),
                lambda index, total: add_load(index, first_load, total),
                self.zeros(),
            )
            self.add_sums(sums.at[warpgroup], total, tile * part_rows, block_stride)

        repeat(product.tiles, multiply_part)

    @property
    def _expansion(self) -> Expansion:
        return Expansion(self.shape.w_format.bits, self.shape.prepared.chunks)

    def zeros(self) -> Num[Array, " sums"]:
        """Sums of a part to begin with."""
        return part_sums.zeros()

    def add_stages(self, total, words, terms, token, part_of_slice, valid) -> Num[Array, " sums"]:
        """See `part_sums.add_stages`."""
        return part_sums.add_stages(total, words, terms, token, part_of_slice, valid, self._expansion)

    def add_sums(self, sums, total, start, block_stride: int) -> None:
        """See `part_sums.add_sums`."""
        part_sums.add_sums(sums, total, start, block_stride)

    def clear_sums(self, sums, warpgroup) -> None:
        part_sums.clear(sums.at[warpgroup])

    def take_sums(self, sums, start, count, text=0) -> Int[Array, "128"]:
        return part_sums.take(sums, start, count)
