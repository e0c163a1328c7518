"""The new token on tensor cores: its rotated vectors in shared memory, its total, and its entry in the cache.

A warpgroup stages its queries, the key and the value as rows of shared memory, a warp some vectors: TILE_QUERIES rows
of queries, of which a plan may use fewer, then the key, then the value. Rows are 16 bytes longer than a vector, so that
`ldmatrix` reads eight of them without bank conflicts. From there the queries become operands of all tiles, the token
becomes a total beside those of the warps, and key and value enter the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, WARPS, lane_and_warp, scalar_of
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_attention.config import MASKED_SCORE, TERMS, TILE_QUERIES, AttentionPlan

KEY_ROW, VALUE_ROW = TILE_QUERIES, TILE_QUERIES + 1
STAGED_ROWS = TILE_QUERIES + 2


class Heads(NamedTuple):
    """Vectors of a token.

    Attributes:
      ref: [heads, head_dim] in global memory.
      first: index of the first.
    """

    ref: Any
    first: Int[Array, ""]


def _stage_twin(plan, rows, queries, last_query, key, value, tables):
    def vector(heads, index, rotates):
        numbers = heads.ref[index].astype(jnp.float32)
        if rotates and tables is not None:
            cos, sin = (table[...] for table in tables)
            first, second = numbers[: plan.half], numbers[plan.half :]
            numbers = jnp.concatenate([first * cos - second * sin, second * cos + first * sin])
        return numbers.astype(rows.dtype)

    for query in range(plan.queries):
        index = jnp.minimum(queries.first + query, last_query)
        rows[query, : plan.head_dim] = vector(queries, index, True)
    rows[KEY_ROW, : plan.head_dim] = vector(key, key.first, True)
    rows[VALUE_ROW, : plan.head_dim] = vector(value, value.first, False)


@with_twin(_stage_twin)
def stage_token(
    plan: AttentionPlan,
    rows: Any,
    queries: Heads,
    last_query: Int[Array, ""],
    key: Heads,
    value: Heads,
    tables: Sequence[Any] | None,
) -> None:
    """Stages the token's vectors, queries and key rotated if there are tables.

    Args:
      plan: of the kernel.
      rows: [STAGED_ROWS, staged elements] in shared memory, of 16-bit floats.
      queries, key, value: what is staged.
      last_query: index of the last query, which those beyond repeat.
      tables: cosines and sines of the token's position, float32 [half] each in global memory; or None.
    """
    refs, kind = [queries.ref, key.ref, value.ref, *(tables or ())], PTX_TYPES[jnp.dtype(rows.dtype).name]
    indices = (queries.first, last_query, key.first, value.first)

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (1 + len(refs)), *[SPLAT] * len(indices)))
    def inline(_, rows, *args):
        pointers = [ptx.pointer(ref, ptx.GLOBAL) for ref in args[: len(refs)]]
        indices = [scalar_of(number) for number in args[len(refs) :]]
        stage_token_of_warp(plan, kind, ptx.pointer(rows, ptx.SHARED), pointers[:3], *indices, pointers[3:])

    inline(rows, *refs, *map(jnp.int32, indices))


def _add_token_twin(plan, rows, totals, terms, length, counts, slopes):
    key, value = (rows[row, : plan.head_dim].astype(jnp.float32) for row in (KEY_ROW, VALUE_ROW))
    for query in range(plan.queries):
        score = jnp.sum(rows[query, : plan.head_dim].astype(jnp.float32) * key) * plan.score_unit
        if slopes is not None:
            score = score + length.astype(jnp.float32) * slopes[query]
        share = counts.astype(jnp.float32)
        totals[query] = value * share
        terms[query] = jnp.stack([jnp.where(counts, score, MASKED_SCORE), share])


@with_twin(_add_token_twin)
def store_token_total(
    plan: AttentionPlan,
    rows: Any,
    totals: Any,
    terms: Any,
    length: Int[Array, ""],
    counts: Array,
    slopes: Sequence[Float[Array, ""]] | None,
) -> None:
    """Stores the total of the new token for every query, after a barrier of the warpgroup.

    Args:
      plan: of the kernel.
      rows: as `stage_token` has written them.
      totals, terms: float32 [queries, head_dim] and [queries, TERMS] in shared memory.
      length: the token's position.
      counts: whether it is among the block's positions; if not, the total is nothing.
      slopes: ALiBi's, by query, or None.
    """
    kind = PTX_TYPES[jnp.dtype(rows.dtype).name]
    numbers = [length.astype(jnp.float32), jnp.where(counts, 1.0, 0.0), *(slopes or ())]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, *[SPLAT] * len(numbers)))
    def inline(_, *args):
        pointers = [ptx.pointer(ref, ptx.SHARED) for ref in args[:3]]
        store_token_total_of_warp(plan, kind, *pointers, *map(scalar_of, args[3:5]), list(map(scalar_of, args[5:])))

    inline(rows, totals, terms, *numbers)


def _enter_twin(plan, rows, keys, values):
    keys[...] = rows[KEY_ROW, : plan.head_dim]
    values[...] = rows[VALUE_ROW, : plan.head_dim]


@with_twin(_enter_twin)
def enter_cache(plan: AttentionPlan, rows: Any, keys: Any, values: Any) -> None:
    """Stores the staged key and value at their position of the cache, [head_dim] in global memory each."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def inline(_, rows, *caches):
        enter_cache_of_warp(plan, ptx.pointer(rows, ptx.SHARED), [ptx.pointer(ref, ptx.GLOBAL) for ref in caches])

    inline(rows, keys, values)


# Below: for use within `plgpu.inline_mgpu`.


def stage_token_of_warp(
    plan: AttentionPlan,
    kind: str,
    rows: Pointer,
    sources: Sequence[Pointer],
    first_query: Value,
    last_query: Value,
    key: Value,
    value: Value,
    tables: Sequence[Pointer],
) -> None:
    """The thread's part of `stage_token`; `sources` are of queries, key and value.

    A lane has two neighbouring rotary pairs; of heads of 64 numbers, lanes 16 to 31 do the same as those before them.
    """
    lane, warp = lane_and_warp()
    pair = ptx.bits_of(lane, plan.half // 2 - 1)
    heads = [ptx.plus(first_query, query) for query in range(plan.queries)]
    heads = [ptx.choose(ptx.less(head, last_query), head, last_query) for head in heads]
    # (row, source, head)
    vectors = [(row, sources[0], head) for row, head in enumerate(heads)]
    vectors += [(KEY_ROW, sources[1], key), (VALUE_ROW, sources[2], value)]
    for owner in range(WARPS):
        own = vectors[owner::WARPS]
        if not own:
            continue
        with ptx.when(ptx.equal(warp, owner)):
            cos_sin = [ptx.load(ptx.advance(table, ptx.times(pair, 8)), 2) for table in tables]
            cos_sin = [[ptx.as_float(word) for word in words] for words in cos_sin]
            halves = [_load_halves(plan, source, head, pair) for _, source, head in own]  # all under way at once
            for (row, _, _), words in zip(own, halves, strict=True):
                if cos_sin and row != VALUE_ROW:
                    words = _rotate(kind, words, *cos_sin)
                at = ptx.advance(rows, ptx.plus(ptx.times(pair, 4), row * plan.staged_bytes))
                for half, word in enumerate(words):
                    ptx.store(ptx.advance(at, 2 * half * plan.half), [word])


def _load_halves(plan: AttentionPlan, source: Pointer, head: Value, pair: Value) -> list[Value]:
    """Two numbers of each half of a vector."""
    start = ptx.advance_far(ptx.advance(source, ptx.times(pair, 4)), head, 2 * plan.head_dim)
    return [ptx.load(ptx.advance(start, 2 * half * plan.half), 1)[0] for half in range(2)]


def _rotate(kind: str, halves: list[Value], cos: list[Value], sin: list[Value]) -> list[Value]:
    first, second = (ptx.expand(kind, word) for word in halves)
    rotated = [
        [
            ptx.subtract(ptx.multiply(a, c), ptx.multiply(b, s))
            for a, b, c, s in zip(first, second, cos, sin, strict=True)
        ],
        [ptx.add(ptx.multiply(b, c), ptx.multiply(a, s)) for a, b, c, s in zip(first, second, cos, sin, strict=True)],
    ]
    return [ptx.pick_bytes(*(ptx.rounded(kind, number) for number in pair), 0x5410) for pair in rotated]


def store_token_total_of_warp(
    plan: AttentionPlan,
    kind: str,
    rows: Pointer,
    totals: Pointer,
    terms: Pointer,
    length: Value,
    share: Value,
    slopes: Sequence[Value],
) -> None:
    """The thread's part of `store_token_total`: a warp has every WARPS-th query."""
    lane, warp = lane_and_warp()
    pair = ptx.bits_of(lane, plan.half // 2 - 1)
    for query in range(plan.queries):
        with ptx.when(ptx.equal(warp, query % WARPS)):
            of_query, key, value = (_staged_numbers(plan, kind, rows, row, pair) for row in (query, KEY_ROW, VALUE_ROW))
            products = [ptx.multiply(a, b) for a, b in zip(of_query, key, strict=True)]
            score = ptx.add(ptx.add(*products[:2]), ptx.add(*products[2:]))
            distance = 1
            while distance < plan.half // 2:
                score = ptx.add(score, ptx.as_float(ptx.exchange(ptx.as_word(score), distance)))
                distance *= 2
            score = ptx.multiply(score, ptx.float32(plan.score_unit))
            if slopes:
                score = ptx.fma(length, slopes[query], score)
            score = ptx.choose(ptx.is_greater(share, 0.0), score, ptx.float32(MASKED_SCORE))
            with ptx.when(ptx.equal(lane, 0)):
                ptx.store(ptx.advance(terms, 4 * TERMS * query), [ptx.as_word(score), ptx.as_word(share)])
            at = ptx.advance(totals, ptx.plus(ptx.times(pair, 8), 4 * plan.head_dim * query))
            for half in range(2):
                words = [ptx.as_word(ptx.multiply(number, share)) for number in value[2 * half : 2 * half + 2]]
                ptx.store(ptx.advance(at, 4 * half * plan.half), words)


def _staged_numbers(plan: AttentionPlan, kind: str, rows: Pointer, row: int, pair: Value) -> list[Value]:
    """Two numbers of each half of a staged vector, as float32."""
    at = ptx.advance(rows, ptx.plus(ptx.times(pair, 4), row * plan.staged_bytes))
    return [
        number
        for half in range(2)
        for number in ptx.expand(kind, ptx.load(ptx.advance(at, 2 * half * plan.half), 1)[0])
    ]


def enter_cache_of_warp(plan: AttentionPlan, rows: Pointer, caches: Sequence[Pointer]) -> None:
    """The thread's part of `enter_cache`: warp 0 stores the key, warp 1 the value, a lane 8 numbers."""
    lane, warp = lane_and_warp()
    for owner, (row, cache) in enumerate(zip((KEY_ROW, VALUE_ROW), caches, strict=True)):
        stores = ptx.bits_of(ptx.equal(warp, owner), ptx.less(lane, plan.row_bytes // 16))
        with ptx.when(stores):
            words = ptx.load(ptx.advance(rows, ptx.plus(ptx.times(lane, 16), row * plan.staged_bytes)), 4)
            ptx.store(ptx.advance(cache, ptx.times(lane, 16)), words)
