"""Attention of the new token to the cache and to itself, a head's positions shared out over blocks and warpgroups.

Every warp has a softmax of its own over the positions that fall to it (16 of 64), so that nothing passes between warps
until the end, when warps and then blocks are put together: with the largest score m, the sum l of 2^(score - m), and
the sum of values a, weighted likewise, the whole is
sum 2^(m - M) a / sum 2^(m - M) l with M the largest m.

Of a cache in codes, number = step * (code - zero) with a step and a zero for every position: scores are
step * (q . code - zero * sum(q)), values are summed with weights times their steps, and weight * step * zero, summed
likewise, is taken from all numbers in the end. The new token is attended to as the cache will hold it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core.fragments import ALONG_ROWS, MATRIX, VECTOR, WARPS
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.decode_attention.steps import quantize_between
from bipolar_jax.kernels.sm90.decode_step.attention import quantized_cache
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import HALF, Cache, CacheRing
from bipolar_jax.kernels.sm90.decode_step.attention.float_cache import (
    add_values,
    load_query,
    row_scores,
    share_columns,
    share_query,
    warp_max,
)
from bipolar_jax.kernels.sm90.decode_step.attention.join import leave_partial
from bipolar_jax.kernels.sm90.decode_step.config import HEAD_DIM, POSITIONS, WARPGROUPS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.exchange import collect, collect_own, share
from bipolar_jax.kernels.sm90.decode_step.vectors import await_vectors, load_vector

_NOTHING = -1e30  # the score of what is not attended to; its weight is 0 beside any other


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
    emulate, bits = shared.emulate, shape.cache_bits
    ring.place(me, block)
    of_scores, of_weights, of_new, of_zeros = (shared.exchange.at[i] for i in range(4))

    def rotated(numbers, halves_exchanged):
        """Number i of the lower half pairs with i of the upper one: a cos - b sin, b cos + a sin."""
        return numbers * tables[0] + halves_exchanged * tables[1]

    head = jnp.minimum(ring.head, shape.heads - 1)
    q_start = qkv_start + head * HEAD_DIM
    k_start = qkv_start + (shape.heads + ring.kv_head) * HEAD_DIM
    places = [(q_start, 0), (q_start, HALF), (k_start, 0), (k_start, HALF), (k_start + shape.kv_heads * HEAD_DIM, 0)]
    q, q_exchanged, k, k_exchanged, v = await_vectors(qkv, places, mark, ring.takes_part, emulate=emulate)
    q = rotated(q, q_exchanged) * (math.log2(math.e) / math.sqrt(HEAD_DIM))
    k, v = _as_cached([rotated(k, k_exchanged), v], cache.keys.dtype, bits, me, shared)
    # The query goes where the sums over rows will be left at the end; the new token's score is summed four times.
    shared_query = shared.columns.at[pl.ds(me * WARPS, WARPS)]
    share_query(shared_query, q, cache.keys.dtype, emulate=emulate)
    share(of_new, me, [q * k], "sum", VECTOR, emulate=emulate)
    synchronize()
    query = load_query(shared_query, emulate=emulate)
    query_sum = None if bits is None else quantized_cache.query_sum(query, emulate=emulate)

    row = plgpu.broadcasted_iota(jnp.int32, (POSITIONS,), 0, layout=ALONG_ROWS)
    nothing = plgpu.layout_cast(jnp.zeros((POSITIONS, HALF // 2), jnp.float32), MATRIX)
    total = plgpu.layout_cast(jnp.zeros((POSITIONS,), jnp.float32), ALONG_ROWS)
    largest, sums, zeros = total + _NOTHING, (nothing, nothing), None if bits is None else total

    def chunk(index, carry):
        largest, total, sums, zeros = carry
        number = ring.number(layer, index)
        ring.wait(0)
        if bits is None:
            scores = row_scores([ring.read(0, half, emulate=emulate) for half in range(2)], query, emulate=emulate)
        else:
            # The query anew, rather than its registers held throughout the loop.
            query_here = load_query(shared_query, emulate=emulate)
            scores = quantized_cache.row_scores(ring.codes(0, emulate=emulate), query_here, bits, emulate=emulate)
            step, zero = ring.grid(0, emulate=emulate)
            scores = (scores - zero * query_sum) * step
        ring.refill(0, number, emulate=emulate)
        positions = row + ring.position(index)
        if cache.slopes is not None:
            scores = scores + positions.astype(jnp.float32) * cache.slopes[head]
        scores = jnp.where(positions < ring.length, scores, _NOTHING)
        larger = warp_max(jnp.maximum(largest, scores), emulate=emulate)
        weight, before = jnp.exp2(scores - larger), jnp.exp2(largest - larger)
        # Warps that have attended to nothing have weights of 2^0; what they sum is dropped when they meet others.
        ring.wait(1)
        if bits is None:
            sums = add_values(sums, before, ring.halves(1, emulate=emulate), weight, emulate=emulate)
        else:
            step, zero = ring.grid(1, emulate=emulate)
            sums = quantized_cache.add_values(
                sums, before, ring.codes(1, emulate=emulate), weight * step, bits, emulate=emulate
            )
            zeros = zeros * before + weight * step * zero
        ring.refill(1, number, emulate=emulate)
        return larger, total * before + weight, sums, zeros

    largest, total, sums, zeros = lax.fori_loop(0, ring.chunks, chunk, (largest, total, sums, zeros))
    share(of_scores, me, [largest], "max", ALONG_ROWS, emulate=emulate)
    shared.meet()
    most = collect(of_scores, "max", emulate=emulate)
    weight = jnp.exp2(largest - most)
    share(of_weights, me, [total * weight], "sum", ALONG_ROWS, emulate=emulate)
    if bits is not None:
        share(of_zeros, me, [zeros * weight], "sum", ALONG_ROWS, emulate=emulate)
    share_columns(shared.columns, me, sums, weight, codes=bits is not None, emulate=emulate)
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
        values = functools.reduce(operator.add, of_warps)
        if bits is not None:
            values = values - collect(of_zeros, "sum", emulate=emulate)
        values = values * before + v * new_weight
        leave_partial(partials, ring.record, values, new_most, whole * before + new_weight, mark, emulate)


def _as_cached(
    vectors: Sequence[Float[Array, "128"]], dtype: jnp.dtype, bits: int | None, me: Int[Array, ""], shared: Any
) -> list[Float[Array, "128"]]:
    """The numbers that the cache will hold in place of these; every warpgroup computes them for itself."""
    if bits is None:
        return [vector.astype(dtype).astype(jnp.float32) for vector in vectors]
    extremes = [
        (vector, kind, shared.exchange.at[4 + 2 * i + j])
        for i, vector in enumerate(vectors)
        for j, kind in enumerate(("min", "max"))
    ]
    for vector, kind, exchange in extremes:
        share(exchange, me, [vector], kind, VECTOR, emulate=shared.emulate)
    synchronize()
    found = [collect_own(exchange, me, kind, emulate=shared.emulate) for _, kind, exchange in extremes]
    numbers = []
    for vector, low, high in zip(vectors, found[::2], found[1::2], strict=True):
        kept = quantize_between((vector,), low, high, bits)
        numbers += kept.numbers()
    return numbers
