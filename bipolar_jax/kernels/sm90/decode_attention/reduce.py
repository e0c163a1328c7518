"""Reduces the rows' softmax sums: over the rows of a warp, the warps of a block, and the blocks of a cluster.

Every warp adds up its four rows by shuffles, for all queries, and leaves a total of each in shared memory; after one
barrier of the block a thread has an element of some vectors, for which it combines the warps' totals, and after a
barrier of the cluster the blocks'. Totals are the largest score, and sums in units of 2^largest: of weights, and of
weighted values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    SPLAT,
    WARPS,
    lane_and_warp,
    numbers_of,
    scalar_of,
    thread_index,
    tree,
)
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, TERMS, AttentionPlan
from bipolar_jax.kernels.sm90.decode_attention.steps import Sums

ROWS_OF_WARP = ROWS // WARPS


def _store_rows_twin(plan, sums, totals, terms):
    for query, each in enumerate(sums):
        by_warp = each.largest.reshape(WARPS, ROWS_OF_WARP)
        largest = jnp.max(by_warp, axis=1)
        share = jnp.exp2(by_warp - largest[:, None])
        values = jnp.concatenate(each.halves, axis=1)
        if each.zeros is not None:
            values = values - each.zeros[:, None]
        values = values.reshape(WARPS, ROWS_OF_WARP, plan.head_dim) * share[..., None]
        totals[:, query] = jnp.sum(values, axis=1)
        terms[:, query, 0] = largest
        terms[:, query, 1] = jnp.sum(each.weight.reshape(WARPS, ROWS_OF_WARP) * share, axis=1)


@with_twin(_store_rows_twin)
def store_rows(plan: AttentionPlan, sums: Sequence[Sums], totals: Any, terms: Any) -> None:
    """Stores the totals of every warp's rows, for all queries.

    Args:
      plan: of the kernel.
      sums: of each query.
      totals, terms: float32 [warps, queries, head_dim] and [warps, queries, TERMS] in shared memory.
    """
    row = plan.layout.reduce(1)
    quantized = plan.bits is not None
    by_query = [[each.largest, each.weight, *([each.zeros] if quantized else []), *each.halves] for each in sums]
    layouts = [row] * (3 if quantized else 2) + [plan.layout] * 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *layouts * len(sums)))
    def inline(_, totals, terms, *arrays):
        pointers = ptx.pointer(totals, ptx.SHARED), ptx.pointer(terms, ptx.SHARED)
        for query in range(len(sums)):
            of_query = arrays[query * len(layouts) : (query + 1) * len(layouts)]
            row_terms = [numbers_of(array)[0] for array in of_query[:-2]]
            halves = [numbers_of(array) for array in of_query[-2:]]
            store_rows_of_warp(plan, row_terms, halves, query, *pointers)

    inline(totals, terms, *(array for arrays in by_query for array in arrays))


def _combined(totals, terms):
    """Totals [parts, elements] and terms [parts, TERMS] combined: values, largest score, weight; in jnp."""
    largest = jnp.max(terms[:, 0])
    share = jnp.exp2(terms[:, 0] - largest)
    return jnp.sum(totals * share[:, None], axis=0), largest, jnp.sum(terms[:, 1] * share)


def _store_totals_twin(plan, totals, terms, target, terms_target, first_head, rank, count, warpgroup):
    for query in range(plan.queries):
        values, largest, weight = _combined(totals[:, query], terms[:, query])

        @when((query < count) & (warpgroup == query % plan.warpgroups))
        def _(query=query, values=values, largest=largest, weight=weight):
            if terms_target is None:
                target[first_head + query] = (values / weight).astype(target.dtype)
            else:
                target[first_head + query, rank] = values
                terms_target[first_head + query, rank] = jnp.stack([largest, weight])


@with_twin(_store_totals_twin)
def store_totals(
    plan: AttentionPlan,
    totals: Any,
    terms: Any,
    target: Any,
    terms_target: Any,
    first_head: Int[Array, ""],
    rank: Int[Array, ""],
    count: Int[Array, ""],
    warpgroup: Int[Array, ""] | int,
) -> None:
    """Combines the totals of the warps, after a barrier of the block, and stores them in global memory.

    Args:
      plan: of the kernel.
      totals, terms: as `store_rows` has written them.
      target: float32 [heads, splits, head_dim] for the block's totals; or, without `terms_target`, the contexts,
        [heads, head_dim].
      terms_target: float32 [heads, splits, TERMS], or None.
      first_head: of the block's queries.
      rank: of the block among those that divide the positions.
      count: queries of the block that exist.
      warpgroup: index of the warpgroup in the block; all of them share the work.
    """
    targets = [target] if terms_target is None else [target, terms_target]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (2 + len(targets)), *[SPLAT] * 4))
    def inline(_, *args):
        refs, numbers = args[:-4], [scalar_of(number) for number in args[-4:]]
        shared = [ptx.pointer(ref, ptx.SHARED) for ref in refs[:2]]
        pointers = [ptx.pointer(ref, ptx.GLOBAL) for ref in refs[2:]]
        store_totals_of_block(plan, *shared, pointers, *numbers, dtype=jnp.dtype(target.dtype))

    inline(totals, terms, *targets, *map(jnp.int32, (first_head, rank, count, warpgroup)))


def _store_contexts_twin(plan, totals, terms, target, first_head, rank, count, warpgroup):
    for query in range(plan.queries):

        @when((query < count) & (rank * plan.warpgroups + warpgroup == query % plan.parts))
        def _(query=query):
            head = first_head + query
            values, _, weight = _combined(totals[head], terms[head])
            target[head] = (values / weight).astype(target.dtype)


@with_twin(_store_contexts_twin)
def store_contexts(
    plan: AttentionPlan,
    totals: Any,
    terms: Any,
    target: Any,
    first_head: Int[Array, ""],
    rank: Int[Array, ""],
    count: Int[Array, ""],
    warpgroup: Int[Array, ""] | int,
) -> None:
    """Combines the totals of the blocks that divide a sequence; each stores its share of the queries' contexts.

    Args:
      plan: of the kernel.
      totals, terms: float32 [heads, splits, head_dim] and [heads, splits, TERMS] in global memory.
      target: [heads, head_dim] in global memory.
      first_head, rank, count, warpgroup: as of `store_totals`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3 + (SPLAT,) * 4)
    def inline(_, *args):
        pointers = [ptx.pointer(ref, ptx.GLOBAL) for ref in args[:3]]
        store_contexts_of_block(plan, *pointers, *map(scalar_of, args[3:]), dtype=jnp.dtype(target.dtype))

    inline(totals, terms, target, *map(jnp.int32, (first_head, rank, count, warpgroup)))


# Below: for use within `plgpu.inline_mgpu`.


def store_rows_of_warp(
    plan: AttentionPlan,
    row_terms: Sequence[Value],
    halves: Sequence[Sequence[Value]],
    query: int,
    totals: Pointer,
    terms: Pointer,
) -> None:
    """The thread's part of `store_rows` for one query.

    Lane 8 r + g has the numbers of row r of its warp, and of each half those that `plan.layout` gives to group g.

    Args:
      row_terms: largest score, weight and, of a quantized cache, zeros of the thread's row.
      halves: the thread's numbers of its row.
    """
    lane, warp = lane_and_warp()
    row, group = ptx.shift_right(lane, 3), ptx.bits_of(lane, 7)
    score, weight, *zeros = row_terms
    largest = score
    for distance in (8, 16):
        largest = _largest(largest, ptx.as_float(ptx.exchange(ptx.as_word(largest), distance)))
    share = ptx.exp2(ptx.subtract(score, largest))
    index = ptx.plus(ptx.times(warp, plan.queries), query)
    weight = _over_rows(ptx.multiply(weight, share))
    with ptx.when(ptx.equal(lane, 0)):
        ptx.store(ptx.advance(terms, ptx.times(index, 4 * TERMS)), [ptx.as_word(largest), ptx.as_word(weight)])
    target = ptx.advance(totals, ptx.times(index, 4 * plan.head_dim))
    vector = plan.layout_vector
    for half, numbers in enumerate(halves):
        if zeros:
            numbers = [ptx.subtract(number, zeros[0]) for number in numbers]
        sums = [_over_rows(ptx.multiply(number, share)) for number in numbers]
        # Row r stores every fourth, from the r-th on.
        for first in range(0, len(sums), ROWS_OF_WARP):
            some = sums[first : first + ROWS_OF_WARP]
            columns = [
                half * plan.half + e // vector * 8 * vector + e % vector for e in range(first, first + len(some))
            ]
            number, column = some[0], ptx.int32(columns[0])
            for r in range(1, len(some)):
                mine = ptx.equal(row, r)
                number, column = ptx.choose(mine, some[r], number), ptx.choose(mine, ptx.int32(columns[r]), column)
            at = ptx.advance_far(target, ptx.plus(column, ptx.times(group, vector)), 4)
            with ptx.when(ptx.less(row, len(some))):
                ptx.store(at, [ptx.as_word(number)])


def _largest(a: Value, b: Value) -> Value:
    return ptx.as_float(ptx.extreme("max", "f32", ptx.as_word(a), ptx.as_word(b)))


def _over_rows(number: Value) -> Value:
    for distance in (8, 16):
        number = ptx.add(number, ptx.as_float(ptx.exchange(ptx.as_word(number), distance)))
    return number


def store_totals_of_block(
    plan: AttentionPlan,
    totals: Pointer,
    terms: Pointer,
    targets: Sequence[Pointer],
    first_head: Value,
    rank: Value,
    count: Value,
    warpgroup: Value,
    *,
    dtype: jnp.dtype,
) -> None:
    """The thread's part of `store_totals`; `targets` are of values, and of terms unless contexts are stored."""
    finished, thread = [], ptx.plus(thread_index(), ptx.times(warpgroup, WARPGROUP))
    for first in range(0, plan.queries * plan.head_dim, plan.warpgroups * WARPGROUP):
        item = ptx.plus(thread, first)
        query, element = _query_and_element(plan, item, ptx.int32(plan.queries - 1))
        parts = [ptx.plus(query, warp * plan.queries) for warp in range(plan.totals)]
        finished.append((item, query, element, _combine(plan, totals, terms, parts, element)))
    for item, query, element, (most, weight, total) in finished:
        exists = ptx.bits_of(ptx.less(query, count), ptx.less(item, plan.queries * plan.head_dim))
        head = ptx.plus(first_head, query)
        with ptx.when(exists):
            if len(targets) == 1:
                at = ptx.advance_far(targets[0], ptx.plus(ptx.times(head, plan.head_dim), element), dtype.itemsize)
                _store_number(at, ptx.divide(total, weight), dtype)
            else:
                part = ptx.plus(ptx.times(head, plan.splits), rank)
                ptx.store(_element_of(plan, targets[0], part, element), [ptx.as_word(total)])
                with ptx.when(ptx.equal(element, 0)):
                    ptx.store(ptx.advance_far(targets[1], part, 4 * TERMS), [ptx.as_word(most), ptx.as_word(weight)])


def store_contexts_of_block(
    plan: AttentionPlan,
    totals: Pointer,
    terms: Pointer,
    target: Pointer,
    first_head: Value,
    rank: Value,
    count: Value,
    warpgroup: Value,
    *,
    dtype: jnp.dtype,
) -> None:
    """The thread's part of `store_contexts`: the elements of all queries are dealt out in runs of a warpgroup.

    All loads come before the first store, so that they are under way at once.
    """
    finished = []
    last = ptx.plus(count, -1)
    part = ptx.plus(ptx.times(rank, plan.warpgroups), warpgroup)
    for turn in range(-(-plan.queries * plan.head_dim // (WARPGROUP * plan.parts))):
        item = ptx.plus(thread_index(), ptx.times(ptx.plus(part, turn * plan.parts), WARPGROUP))
        query, element = _query_and_element(plan, item, last)
        head = ptx.plus(first_head, query)
        parts = [ptx.plus(ptx.times(head, plan.splits), other) for other in range(plan.splits)]
        finished.append((item, head, element, _combine(plan, totals, terms, parts, element)))
    for item, head, element, (_, weight, total) in finished:
        with ptx.when(ptx.less(item, ptx.times(count, plan.head_dim))):
            at = ptx.advance_far(target, ptx.plus(ptx.times(head, plan.head_dim), element), dtype.itemsize)
            _store_number(at, ptx.divide(total, weight), dtype)


def _query_and_element(plan: AttentionPlan, item: Value, last: Value) -> tuple[Value, Value]:
    """The query of an element of all queries, at most `last`; and the index of the element in its vector."""
    query = ptx.divided(item, plan.head_dim)
    element = ptx.plus(item, ptx.times(query, -plan.head_dim))
    return ptx.choose(ptx.less(query, last), query, last), element


def _element_of(plan: AttentionPlan, totals: Pointer, part: Value, element: Value) -> Pointer:
    return ptx.advance_far(totals, ptx.plus(ptx.times(part, plan.head_dim), element), 4)


def _combine(
    plan: AttentionPlan, totals: Pointer, terms: Pointer, parts: Sequence[Value], element: Value
) -> tuple[Value, Value, Value]:
    """The largest score, the weight and the value of some parts of totals together."""
    own = [[ptx.as_float(word) for word in ptx.load(ptx.advance_far(terms, part, 4 * TERMS), TERMS)] for part in parts]
    values = [ptx.as_float(ptx.load(_element_of(plan, totals, part, element), 1)[0]) for part in parts]
    most = tree(_largest, [largest for largest, _ in own])
    shares = [ptx.exp2(ptx.subtract(largest, most)) for largest, _ in own]
    weight = tree(ptx.add, [ptx.multiply(each, share) for (_, each), share in zip(own, shares, strict=True)])
    return most, weight, tree(ptx.add, [ptx.multiply(*pair) for pair in zip(values, shares, strict=True)])


def _store_number(at: Pointer, number: Value, dtype: jnp.dtype) -> None:
    if dtype.itemsize == 4:
        ptx.store(at, [ptx.as_word(number)])
    else:
        ptx.store_half(at, ptx.rounded(PTX_TYPES[dtype.name], number))
