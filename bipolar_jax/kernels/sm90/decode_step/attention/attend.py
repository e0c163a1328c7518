"""Attention of the new token to the cache and to itself; a head's positions are divided over blocks and warpgroups.

Where heads share their keys by fours, each warpgroup has a head of its own instead, and positions are divided over
blocks alone: a chunk of the cache is loaded once for four heads.

Every warp keeps a softmax of its own over its positions, 16 of each chunk of 64, so nothing passes between warps inside
the loop. At the end warps and then blocks are combined. With the largest score m, the sum l of 2^(score - m), and the
sum of values a with the same weights, the result is sum 2^(m - M) a / sum 2^(m - M) l, where M is the largest m.

In a quantized cache a number is step * (code - zero), with a step and a zero for every position. Scores are
step * (q . code - zero * sum(q)). Values are summed with weights times steps; the sum of weight * step * zero is
subtracted from all elements at the end. The new token is attended to with the numbers that the cache will hold.
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

from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.fragments import ALONG_ROWS, MATRIX, VECTOR, WARPS
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.sync import synchronize
from bipolar_jax.kernels.sm90.decode_attention.steps import quantize_between
from bipolar_jax.kernels.sm90.decode_step.attention import quantized_cache
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import COLUMNS, KEYS, VALUES, Cache, CacheRing
from bipolar_jax.kernels.sm90.decode_step.attention.combine import store_partial
from bipolar_jax.kernels.sm90.decode_step.attention.float_cache import (
    SUMS_SHAPE,
    add_values,
    load_query,
    row_scores,
    store_context_sums,
    store_query,
    warp_max,
)
from bipolar_jax.kernels.sm90.decode_step.attention.head_norms import HeadPair, normalize_heads
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import CHUNK_POSITIONS, WARPGROUPS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import Awaited
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import (
    BLOCK_WARPS,
    reduce_block,
    reduce_warpgroup,
    reduce_warps,
)
from bipolar_jax.kernels.sm90.decode_step.cooperative.rotations import rotate_heads
from bipolar_jax.kernels.sm90.decode_step.cooperative.timeline import Timeline
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import load_vector, poll_vectors

_MASKED = -1e30  # the score of a position that is not attended to: its weight beside any other is 0


def load_tables(cache: Cache, text: Int[Array, ""] | int) -> list[Float[Array, "128"]]:
    """Cosines and sines of the position of a text's new token."""
    first = text * WARPGROUP
    return [load_vector(table, first, first + WARPGROUP) for table in (cache.cos, cache.sin)]


def attend(
    shape: LayersShape,
    cache: Cache,
    ring: CacheRing,
    layer: Int[Array, ""],
    tables: Sequence[Float[Array, "128"]],
    gains: Sequence[HeadPair],
    qkv: Any,
    qkv_start: Int[Array, ""],
    phase: Int[Array, ""],
    warpgroup: Int[Array, ""],
    block: Int[Array, ""],
    shared: Any,
    partials: Any,
    timeline: Timeline,
) -> None:
    """Stores this block's partial attention, or one of each warpgroup, in global memory; all warpgroups take part.

    Vectors of the new token have 128 elements; of a head of 64 these are two copies.

    Args:
      shape, cache, ring: of the layers.
      layer: counted from the first that is computed.
      tables: `load_tables`.
      gains: `head_norms.load_gains`.
      qkv: flat float32 in global memory; the layer's projections of this block's text begin at `qkv_start`.
      phase: the phase bit of the projections, and of what is stored.
      warpgroup, block: indices of the calling threads.
      shared: `phases.SharedMemory`.
      partials: flat float32 in global memory, `splits` of `partial_size` for every head.
      timeline: of this phase.
    """
    bits, size, half = shape.cache_bits, shape.head_dim, shape.head_dim // 2
    ring.assign(warpgroup, block)
    # Warpgroups of one head meet and reduce over the block; those of different heads each for itself.
    alone = shape.heads_at_once > 1
    meet, copies = (synchronize, 1) if alone else (shared.meet, WARPGROUPS)

    def reduce(results, kind):
        return reduce_warpgroup(results, warpgroup, kind) if alone else reduce_block(results, kind)

    score_results, weight_results, new_results, zero_results = (shared.warp_results.at[i] for i in range(4))

    def rotated(numbers, halves_swapped):
        """Element i of the first half pairs with i of the second: a cos - b sin, b cos + a sin."""
        return numbers * tables[0] + halves_swapped * tables[1]

    head = jnp.minimum(ring.head, shape.heads - 1)
    q_start = qkv_start + head * size
    k_start = qkv_start + (shape.heads + ring.kv_head) * size
    starts = [q_start, q_start, k_start, k_start, k_start + shape.kv_heads * size]
    q, q_swapped, k, k_swapped, v = poll_vectors(qkv, starts, [0, half, 0, half, 0], Awaited(phase, ring.active), size)
    timeline.mark("arrived")
    # The query lies where the sums of values are stored at the end. Every warpgroup adds up the new token's score.
    shared_query = shared.context_sums.at[pl.ds(warpgroup * WARPS, WARPS)]
    heads = [(q, q_swapped), (k, k_swapped)]
    if shape.head_norm_eps is not None:  # through rows that are written again when the chunks have been read
        results = shared.warp_results.at[pl.ds(0, len(heads))]
        heads = normalize_heads(heads, gains, shape.head_norm_eps, warpgroup, results)
    q, k = (rotated(*pair) for pair in heads)
    if shape.key_rotation is not None:  # of quantized keys: `_as_cached` has the barrier before the query is stored
        q, k = rotate_heads(shared_query, [q, k], size)
    q = q * (math.log2(math.e) / math.sqrt(size))
    k, v = _as_cached([k, v], cache.keys.dtype, bits, warpgroup, shared)
    store_query(shared_query, q, cache.keys.dtype, size)
    reduce_warps(new_results, warpgroup, [q * k], "sum", VECTOR)
    synchronize()
    timeline.mark("encoded")
    query = load_query(shared_query, size)
    query_sum = None if bits is None else quantized_cache.query_sum(query)

    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK_POSITIONS,), 0, layout=ALONG_ROWS)
    no_sums = plgpu.layout_cast(jnp.zeros(SUMS_SHAPE, jnp.float32), MATRIX)
    total = plgpu.layout_cast(jnp.zeros((CHUNK_POSITIONS,), jnp.float32), ALONG_ROWS)
    largest, sums, zeros = total + _MASKED, (no_sums,) * (size // COLUMNS), None if bits is None else total

    def chunk(index, carry):
        largest, total, sums, zeros = carry
        load_index = ring.load_index(layer, index)
        with timeline.waiting():
            ring.wait(KEYS)
        if bits is None:
            scores = row_scores(ring.read(KEYS), query)
        else:
            # Loaded again, so that no registers hold it over the loop.
            query_again = load_query(shared_query, size)
            scores = quantized_cache.row_scores(ring.codes(KEYS), query_again, bits)
            step, zero = ring.grid(KEYS)
            scores = (scores - zero * query_sum) * step
        ring.refill(KEYS, load_index)
        positions = row + ring.position(index)
        if cache.slopes is not None:
            scores = scores + positions.astype(jnp.float32) * cache.slopes[head]
        scores = jnp.where(positions < ring.length, scores, _MASKED)
        larger = warp_max(jnp.maximum(largest, scores))
        weight, before = jnp.exp2(scores - larger), jnp.exp2(largest - larger)
        # A warp whose positions are all masked has weights of 2^0; its sums are dropped when warps are combined.
        with timeline.waiting():
            ring.wait(VALUES)
        if bits is None:
            sums = add_values(sums, before, ring.tiles(VALUES), weight)
        else:
            step, zero = ring.grid(VALUES)
            sums = quantized_cache.add_values(sums, before, ring.codes(VALUES), weight * step, bits)
            zeros = zeros * before + weight * step * zero
        ring.refill(VALUES, load_index)
        return larger, total * before + weight, sums, zeros

    largest, total, sums, zeros = lax.fori_loop(0, ring.chunks, chunk, (largest, total, sums, zeros))
    timeline.mark("multiplied")
    reduce_warps(score_results, warpgroup, [largest], "max", ALONG_ROWS)
    meet()
    most = reduce(score_results, "max")
    weight = jnp.exp2(largest - most)
    reduce_warps(weight_results, warpgroup, [total * weight], "sum", ALONG_ROWS)
    if bits is not None:
        reduce_warps(zero_results, warpgroup, [zeros * weight], "sum", ALONG_ROWS)
    store_context_sums(shared.context_sums, warpgroup, sums, weight, codes=bits is not None)
    meet()
    timeline.mark("met")

    @when(ring.active if alone else (warpgroup == 0) & ring.active)
    def _():
        rows = [warpgroup * WARPS + warp for warp in range(WARPS)] if alone else range(BLOCK_WARPS)
        by_warp = [plgpu.load(shared.context_sums.at[row], layout=VECTOR, optimized=False) for row in rows]
        weight_sum = reduce(weight_results, "sum")
        new_score = reduce(new_results, "sum") * (size / (WARPGROUP * copies))
        if cache.slopes is not None:
            new_score += ring.length.astype(jnp.float32) * cache.slopes[head]
        # The head's last block attends to the new token too, unless the cache is full.
        with_new = ring.has_new & (ring.length < cache.keys.shape[3])
        new_most = jnp.maximum(most, jnp.where(with_new, new_score, _MASKED))
        before, new_weight = jnp.exp2(most - new_most), jnp.where(with_new, jnp.exp2(new_score - new_most), 0.0)
        values = functools.reduce(operator.add, by_warp)
        if bits is not None:
            values = values - reduce(zero_results, "sum")
        values = values * before + v * new_weight
        store_partial(shape, partials, ring.partial, values, new_most, weight_sum * before + new_weight, phase)
        timeline.mark("stored")


def _as_cached(
    vectors: Sequence[Float[Array, "128"]], dtype: jnp.dtype, bits: int | None, warpgroup: Int[Array, ""], shared: Any
) -> list[Float[Array, "128"]]:
    """The numbers that the cache will hold in place of these; every warpgroup computes them for itself."""
    if bits is None:
        return [vector.astype(dtype).astype(jnp.float32) for vector in vectors]
    extremes = [
        (vector, kind, shared.warp_results.at[4 + 2 * i + j])
        for i, vector in enumerate(vectors)
        for j, kind in enumerate(("min", "max"))
    ]
    for vector, kind, results in extremes:
        reduce_warps(results, warpgroup, [vector], kind, VECTOR)
    synchronize()
    found = [reduce_warpgroup(results, warpgroup, kind) for _, kind, results in extremes]
    numbers = []
    for vector, low, high in zip(vectors, found[::2], found[1::2], strict=True):
        numbers += quantize_between((vector,), low, high, bits).numbers()
    return numbers
