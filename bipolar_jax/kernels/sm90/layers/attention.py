"""Attention of the new token to the cache and to itself, a head's positions shared out over blocks and warpgroups.

Every warp has a softmax of its own over the positions that fall to it (16 of 64), so that nothing passes between warps
until the end, when warps and then blocks are put together: with the largest score m, the sum l of 2^(score - m), and
the sum of values a, weighted likewise, the whole is
sum 2^(m - M) a / sum 2^(m - M) l with M the largest m.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.kernels.sm90.layers.attention_rows import (
    add_values,
    await_joined,
    load_query,
    row_scores,
    share_columns,
    share_query,
    warp_max,
)
from bipolar_jax.kernels.sm90.layers.exchange import collect, share
from bipolar_jax.kernels.sm90.layers.registers import ALONG_ROWS, MATRIX, VECTOR, WARPS, pinned, synchronize
from bipolar_jax.kernels.sm90.layers.shape import HEAD_DIM, PARTIAL, POSITIONS, TILE, WARPGROUPS, LayersShape
from bipolar_jax.kernels.sm90.layers.vectors import await_vectors, load_vector, store_vector

HALF = HEAD_DIM // 2
_NOTHING = -1e30  # the score of what is not attended to; its weight is 0 beside any other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Refs of what is attended to.

    Attributes:
      keys, values: [layers, 1, kv_heads, capacity, HEAD_DIM].
      length: positions that hold a token, int32 [1].
      cos, sin: of the new token's position, float32 [HEAD_DIM]: each twice, the sines negative at first.
      slopes: ALiBi's, float32 [heads], for scores in base 2; or None.
    """

    keys: Any
    values: Any
    length: Any
    cos: Any
    sin: Any
    slopes: Any = None


class Place(NamedTuple):
    """A block's: which head it works for, which of those that share it this is, and whether there is such a head."""

    head: Int[Array, ""]
    split: Int[Array, ""]
    takes_part: Bool[Array, ""]


def place_of(shape: LayersShape, block: Int[Array, ""]) -> Place:
    head = lax.div(block, shape.splits)
    return Place(head, lax.rem(block, shape.splits), head < shape.heads)


class CacheRing:
    """Chunks of 64 positions of a head's keys and values, of one warpgroup, over all layers.

    One slot of keys and one of values, or one for both in turn.
    """

    def __init__(self, shape: LayersShape, cache: Cache, layers: range, me, block, slots, arrived):
        self._shape, self._cache, self._slots, self._arrived = shape, cache, slots, arrived
        self._slots_apart = shape.cache_slots == 2
        self._layers, self._first_layer = len(layers), layers[0]
        self.length = cache.length[0]
        self.place(me, block)
        self._load(0, 0 * me)
        if self._slots_apart:
            self._load(1, 0 * me)

    def place(self, me, block) -> None:
        """Computes which chunks are this warpgroup's: anew in every layer, rather than to hold them in registers."""
        shape, self._me = self._shape, me
        self.head, split, self.takes_part = place_of(shape, block)
        self.kv_head = lax.div(jnp.minimum(self.head, shape.heads - 1), shape.heads // shape.kv_heads)
        chunks = lax.div(self.length + (POSITIONS - 1), POSITIONS)
        self._first = lax.div(chunks * split, shape.splits) + me
        end = lax.div(chunks * (split + 1), shape.splits)
        mine = lax.div(jnp.maximum(end - self._first + (WARPGROUPS - 1), 0), WARPGROUPS)
        self.chunks = jnp.where(self.takes_part, mine, 0)
        self.has_new = self.takes_part & (split == shape.splits - 1)
        self.record = self.head * shape.splits + split

    def number(self, layer, chunk):
        """The count of chunks before one."""
        return layer * self.chunks + chunk

    def position(self, chunk):
        """Of a chunk's first row."""
        return (self._first + chunk * WARPGROUPS) * POSITIONS

    def wait(self, kind: int) -> None:
        """Waits for a chunk of keys (0) or of values (1)."""
        plgpu.barrier_wait(self._arrived.at[kind * WARPGROUPS + self._me])

    def read(self, kind: int, half: int, *, emulate: bool) -> Float[Array, "64 64"]:
        """The lower or the upper half of every vector."""
        return plgpu.load(self.halves(kind, emulate=emulate)[half], layout=MATRIX)

    def halves(self, kind: int, *, emulate: bool) -> list:
        """Refs of the lower and the upper half of every vector."""
        slot = self._slots.at[kind if self._slots_apart else 0, pinned(self._me, emulate=emulate)]
        return [slot.at[half] for half in range(2)]

    def refill(self, kind: int, number, *, emulate: bool) -> None:
        """Loads what comes next into the slot of the number-th chunk's keys or values, which have been read."""
        synchronize(emulate=emulate)
        if self._slots_apart:
            self._load(kind, number + 1)
        else:
            self._load(1 - kind, number + kind)

    def _at(self, kind: int):
        return self._slots.at[kind if self._slots_apart else 0, self._me]

    def _load(self, kind: int, number) -> None:
        @pl.when(number < self._layers * self.chunks)
        def _():
            layer = self._first_layer + lax.div(number, jnp.maximum(self.chunks, 1))
            chunk = lax.rem(number, jnp.maximum(self.chunks, 1))
            source = (self._cache.keys, self._cache.values)[kind]
            for half in range(2):
                # [64 positions, 64 numbers]
                plgpu.copy_gmem_to_smem(
                    source.at[layer, 0, self.kv_head, pl.ds(self.position(chunk), POSITIONS), pl.ds(half * HALF, HALF)],
                    self._at(kind).at[half],
                    self._arrived.at[kind * WARPGROUPS + self._me],
                )


def load_tables(cache: Cache, *, emulate: bool) -> list[Float[Array, "128"]]:
    """Cosines and sines of the new token's position."""
    return [load_vector(table, 0, HEAD_DIM, emulate=emulate) for table in (cache.cos, cache.sin)]


def attend(
    shape: LayersShape,
    cache: Cache,
    ring: CacheRing,
    layer: Int[Array, ""],
    tables: Sequence[Float[Array, "128"]],
    qkv: Any,
    qkv_start: Int[Array, ""],
    mark: Int[Array, ""],
    me: Int[Array, ""],
    block: Int[Array, ""],
    shared: Any,
    partials: Any,
) -> None:
    """Leaves this block's part of its head's attention in memory; every warpgroup takes part.

    Args:
      shape, cache, ring: of the layers.
      layer: counted from the first that is computed.
      tables: `load_tables`.
      qkv: flat float32 in memory; the layer's projections begin at `qkv_start`.
      mark: of the projections, and of what is left.
      me, block: which warpgroup and block.
      shared: `exchange`, `columns`, `meet`.
      partials: flat float32 in memory, `splits` of PARTIAL numbers for every head.
    """
    emulate = shared.emulate
    ring.place(me, block)
    of_scores, of_weights, of_new = (shared.exchange.at[i] for i in range(3))

    def rotated(numbers, halves_exchanged):
        """Number i of the lower half pairs with i of the upper one: a cos - b sin, b cos + a sin."""
        return numbers * tables[0] + halves_exchanged * tables[1]

    def as_cached(numbers):
        return numbers.astype(cache.keys.dtype).astype(jnp.float32)

    head = jnp.minimum(ring.head, shape.heads - 1)
    q_start = qkv_start + head * HEAD_DIM
    k_start = qkv_start + (shape.heads + ring.kv_head) * HEAD_DIM
    places = [(q_start, 0), (q_start, HALF), (k_start, 0), (k_start, HALF), (k_start + shape.kv_heads * HEAD_DIM, 0)]
    q, q_exchanged, k, k_exchanged, v = await_vectors(qkv, places, mark, ring.takes_part, emulate=emulate)
    q = rotated(q, q_exchanged) * (math.log2(math.e) / math.sqrt(HEAD_DIM))
    k, v = as_cached(rotated(k, k_exchanged)), as_cached(v)
    # The query goes where the sums over rows will be left at the end; the new token's score is summed four times.
    shared_query = shared.columns.at[pl.ds(me * WARPS, WARPS)]
    share_query(shared_query, q, cache.keys.dtype, emulate=emulate)
    share(of_new, me, [q * k], "sum", VECTOR, emulate=emulate)
    synchronize(emulate=emulate)
    query = load_query(shared_query, emulate=emulate)

    row = plgpu.broadcasted_iota(jnp.int32, (POSITIONS,), 0, layout=ALONG_ROWS)
    nothing = plgpu.layout_cast(jnp.zeros((POSITIONS, HALF // 2), jnp.float32), MATRIX)
    total = plgpu.layout_cast(jnp.zeros((POSITIONS,), jnp.float32), ALONG_ROWS)
    largest, sums = total + _NOTHING, (nothing, nothing)

    def chunk(index, carry):
        largest, total, sums = carry
        number = ring.number(layer, index)
        ring.wait(0)
        scores = row_scores([ring.read(0, half, emulate=emulate) for half in range(2)], query, emulate=emulate)
        ring.refill(0, number, emulate=emulate)
        positions = row + ring.position(index)
        if cache.slopes is not None:
            scores = scores + positions.astype(jnp.float32) * cache.slopes[head]
        scores = jnp.where(positions < ring.length, scores, _NOTHING)
        larger = warp_max(jnp.maximum(largest, scores), emulate=emulate)
        weight, before = jnp.exp2(scores - larger), jnp.exp2(largest - larger)
        # Warps that have attended to nothing have weights of 2^0; what they sum is dropped when they meet others.
        ring.wait(1)
        sums = add_values(sums, before, ring.halves(1, emulate=emulate), weight, emulate=emulate)
        ring.refill(1, number, emulate=emulate)
        return larger, total * before + weight, sums

    largest, total, sums = lax.fori_loop(0, ring.chunks, chunk, (largest, total, sums))
    share(of_scores, me, [largest], "max", ALONG_ROWS, emulate=emulate)
    shared.meet()
    most = collect(of_scores, "max", emulate=emulate)
    weight = jnp.exp2(largest - most)
    share(of_weights, me, [total * weight], "sum", ALONG_ROWS, emulate=emulate)
    share_columns(shared.columns, me, sums, weight, emulate=emulate)
    shared.meet()

    @pl.when((me == 0) & ring.takes_part)
    def _():
        warps = range(WARPGROUPS * WARPS)
        of_warps = [plgpu.load(shared.columns.at[warp], layout=VECTOR, optimized=False) for warp in warps]
        whole = collect(of_weights, "sum", emulate=emulate)
        new_score = collect(of_new, "sum", emulate=emulate) * (1 / WARPGROUPS)
        if cache.slopes is not None:
            new_score += ring.length.astype(jnp.float32) * cache.slopes[head]
        # The last block has the new token too; a full cache keeps what it has, and that alone is attended to.
        joins = ring.has_new & (ring.length < cache.keys.shape[3])
        new_most = jnp.maximum(most, jnp.where(joins, new_score, _NOTHING))
        before, new_weight = jnp.exp2(most - new_most), jnp.where(joins, jnp.exp2(new_score - new_most), 0.0)
        values = functools.reduce(operator.add, of_warps) * before + v * new_weight
        leave_partial(partials, ring.record, values, new_most, whole * before + new_weight, mark, emulate)


def clear(shape: LayersShape, block, partials, context, *, emulate: bool) -> None:
    """Takes the mark that others wait for off what this block will leave."""
    place = place_of(shape, block)
    start = place.split * shape.joined
    nothing = plgpu.layout_cast(jnp.zeros(HEAD_DIM, jnp.float32), VECTOR)

    @pl.when(place.takes_part)
    def _():
        leave_partial(partials, place.head * shape.splits + place.split, nothing, 0.0, 0.0, 0, emulate)

    @pl.when(place.takes_part & (start < HEAD_DIM))
    def _():
        store_vector(context, nothing, place.head * HEAD_DIM + start, shape.joined, 0, emulate=emulate)


def join(shape: LayersShape, block, partials, context, mark, *, emulate: bool) -> None:
    """Puts together, of this block's head, what the blocks left that share it; each of them some of the numbers.

    The next product's token is then as short as any: to read all partial attentions in every block took longer than
    to have blocks wait for each other once more.
    """
    place = place_of(shape, block)
    start = place.split * shape.joined

    @pl.when(place.takes_part & (start < HEAD_DIM))
    def _():
        head = (place.head, shape.splits, PARTIAL)
        numbers = await_joined(partials, *head, start, shape.joined, mark, 1, emulate=emulate)
        store_vector(context, numbers, place.head * HEAD_DIM + start, shape.joined, mark, emulate=emulate)


def leave_partial(partials, record, values, largest, total, mark, emulate: bool) -> None:
    """Stores a partial attention: the sum of values, then in turn the largest score and the sum of weights."""
    start = record * PARTIAL
    store_vector(partials, values, start, HEAD_DIM, mark, emulate=emulate)
    even = lax.rem(plgpu.broadcasted_iota(jnp.int32, (HEAD_DIM,), 0, layout=VECTOR), 2) == 0
    store_vector(partials, jnp.where(even, largest, total), start + HEAD_DIM, TILE, mark, emulate=emulate)
