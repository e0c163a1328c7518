"""Products of bit planes with binary wgmma: `WeightKind` of weights that are not prepared.

A load is one plane of a tile, a K slice for each warpgroup.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx, wgmma
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, VECTOR, lane_and_warp, pinned, repeat, scalar_of, word_of
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.core.wgmma import WORDS_PER_ROW
from bipolar_jax.kernels.sm90.decode_step.bit_planes import store_bit_planes
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import TILE, WARPGROUPS, LayersShape, Product
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights, WeightRing

_word_tiles = functools.partial(plgpu.SMEM, dtype=jnp.uint32, transforms=wgmma.TILE_TRANSFORMS)


@dataclasses.dataclass(frozen=True)
class PlaneKind:
    """See `weight_ring.WeightKind`.

    Slots are uint32 [w_slots * warpgroups + 1, 32, 32], of which the last entry is never written; the token's planes
    are uint32 [warpgroups, K slices, 8, 32].
    """

    shape: LayersShape

    @property
    def copies(self) -> int:
        return WARPGROUPS

    @property
    def slot_types(self) -> Any:
        return _word_tiles((WARPGROUPS * self.shape.w_slots + 1, TILE, WORDS_PER_ROW))

    @property
    def sums_type(self) -> Any:
        return plgpu.SMEM((WARPGROUPS, self.shape.max_rows), jnp.int32)

    @property
    def operand_type(self) -> Any:
        return _word_tiles((WARPGROUPS, self.shape.max_k_slices, 8, WORDS_PER_ROW))

    def loads_per_tile(self, product: Product) -> int:
        return product.k_slices * self.shape.w_format.bits

    def load_tile(self, load: Callable, slots, weights: ProductWeights, product: Product, layer, tile, block, carry):
        bits = self.shape.w_format.bits
        half, tile = lax.div(tile, product.rows // TILE), lax.rem(tile, product.rows // TILE)
        row_in_half = block * product.rows + tile * TILE
        # Rows beyond a half must not be the next half's: from row n on TMA fills in zeros and reads nothing.
        row = jnp.where(row_in_half < product.half_size, half * product.half_size + row_in_half, product.n)

        def load_plane(index, carry):
            k_slice, plane = lax.div(index, bits), lax.rem(index, bits)
            plane_rows = weights.words.at[layer, plane, pl.ds(row, TILE)]
            first_word = k_slice * WARPGROUPS * WORDS_PER_ROW

            def copy(slot, arrived):
                for warpgroup in range(WARPGROUPS):
                    # [32, 32 words]; zeros beyond K and beyond the last row.
                    plgpu.copy_gmem_to_smem(
                        plane_rows.at[:, pl.ds(first_word + warpgroup * WORDS_PER_ROW, WORDS_PER_ROW)],
                        slots.at[slot * WARPGROUPS + warpgroup],
                        arrived,
                    )

            return load(copy, carry)

        return lax.fori_loop(0, pinned(product.k_slices * bits), load_plane, carry)

    def of_warpgroup(self, slots, slot, warpgroup) -> Any:
        """The warpgroup's K slice, [32, 32 words], behind which there is memory."""
        return slots.at[slot * WARPGROUPS + warpgroup]

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
        del text  # there is one
        tiles = [operand.at[warpgroup, i] for i in range(len(k_slices))]
        store_bit_planes(tiles, code_sums, warpgroup, k_slices, starts, k, half_steps, middle, self.shape.a_format)
        plgpu.commit_smem()

    def multiply(self, ring: WeightRing, layer, name: str, warpgroup, operand, sums) -> None:
        """Stores this warpgroup's sums of every tile of the block.

        A loop over all planes and K slices multiplies one or two planes at a time. Unrolled code for more of them does
        not fit the instruction cache, and would release slots later.
        """
        product, weights = self.shape.products[name], self.shape.w_format.plane_weights
        planes = 1 if len(weights) % 2 else 2

        def add_planes(index, first_load, total):
            load = index * planes
            k_slice, plane = lax.div(load, len(weights)), lax.rem(load, len(weights))
            # Wait for all planes before the first wgmma: a wait is a loop, and ptxas serializes wgmma in flight over
            # loops.
            tiles = [ring.wait(first_load + load + i, warpgroup) for i in range(planes)]
            accumulators = [
                wgmma.start(
                    (wgmma.ROWS_PER_INSTRUCTION, 8),
                    tile,
                    operand.at[warpgroup, k_slice],
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
            store_plane_sums(sums.at[warpgroup], total, self.shape.a_format.plane_weights, tile * TILE)

        repeat(product.tiles, multiply_tile)

    def clear_sums(self, sums, warpgroup) -> None:
        del sums, warpgroup  # stored, not added to

    def take_sums(self, sums, start, count, text=0) -> Int[Array, "128"]:
        del count, text
        return sum(
            plgpu.load(sums.at[warpgroup, pl.ds(start, WARPGROUP)], layout=VECTOR, optimized=False)
            for warpgroup in range(WARPGROUPS)
        )


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
