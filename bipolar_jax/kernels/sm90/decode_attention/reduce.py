"""Reduces the rows' softmax sums: over the rows of a warp, the warps of a block, and the blocks of a cluster.

Every warp adds up its four rows by shuffles, for all queries, and leaves a total of each in shared memory; after one
barrier of the warpgroup a thread has an element of the vector, for which it combines the warps' totals. Totals are the
largest score, and sums in units of 2^largest: of weights, and of weighted values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool

from bipolar_jax.kernels.sm90.core import ptx
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
from bipolar_jax.kernels.sm90.decode_attention.config import ROWS, AttentionPlan
from bipolar_jax.kernels.sm90.decode_attention.steps import Sums

ROWS_OF_WARP = ROWS // WARPS
TERMS = 2  # of a total, besides the values: the largest score and the sum of weights


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


def _store_total_twin(plan, query, totals, terms, target, terms_target, exists):
    values, largest, weight = _combined(totals[:, query], terms[:, query])

    @pl.when(exists)
    def _():
        if terms_target is None:
            target[...] = (values / weight).astype(target.dtype)
        else:
            target[...] = values
            terms_target[...] = jnp.stack([largest, weight])


@with_twin(_store_total_twin)
def store_total(
    plan: AttentionPlan, query: int, totals: Any, terms: Any, target: Any, terms_target: Any, exists: Bool[Array, ""]
) -> None:
    """Combines the totals of the warps, after a barrier of the warpgroup, and stores them in global memory.

    Args:
      plan: of the kernel.
      query: index of the query in the block.
      totals, terms: as `store_rows` has written them.
      target: [head_dim]: of float32 for the block's total; or, without `terms_target`, of the query's context.
      terms_target: float32 [TERMS], or None.
      exists: whether there is such a query.
    """
    targets = [target] if terms_target is None else [target, terms_target]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (2 + len(targets)), SPLAT))
    def inline(_, totals, terms, *rest):
        *targets, exists = rest
        sources = [
            (
                ptx.advance(ptx.pointer(totals, ptx.SHARED), 4 * plan.head_dim * (warp * plan.queries + query)),
                ptx.advance(ptx.pointer(terms, ptx.SHARED), 4 * TERMS * (warp * plan.queries + query)),
            )
            for warp in range(WARPS)
        ]
        pointers = [ptx.pointer(target, ptx.GLOBAL) for target in targets]
        with ptx.when(ptx.equal(scalar_of(exists), 1)):
            store_combined(plan, sources, *pointers, dtype=target.dtype)

    inline(totals, terms, *targets, exists.astype(jnp.int32))


def _store_context_twin(plan, totals, terms, target):
    values, _, weight = _combined(totals[...], terms[...])
    target[...] = (values / weight).astype(target.dtype)


@with_twin(_store_context_twin)
def store_context(plan: AttentionPlan, totals: Any, terms: Any, target: Any) -> None:
    """Combines the totals of the blocks that divide a sequence, and stores the context of a query.

    Args:
      plan: of the kernel.
      totals, terms: float32 [splits, head_dim] and [splits, TERMS] in global memory.
      target: [head_dim] in global memory.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def inline(_, totals, terms, target_ref):
        totals, terms, pointer = (ptx.pointer(ref, ptx.GLOBAL) for ref in (totals, terms, target_ref))
        sources = [
            (ptx.advance(totals, 4 * plan.head_dim * rank), ptx.advance(terms, 4 * TERMS * rank))
            for rank in range(plan.splits)
        ]
        store_combined(plan, sources, pointer, dtype=target.dtype)

    inline(totals, terms, target)


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


def store_combined(
    plan: AttentionPlan,
    sources: Sequence[tuple[Pointer, Pointer]],
    target: Pointer,
    terms_target: Pointer | None = None,
    *,
    dtype: jnp.dtype,
) -> None:
    """Combines totals, each of values and terms; stores the total, or without terms the context in `dtype`."""
    thread = thread_index()
    terms = [[ptx.as_float(word) for word in ptx.load(pointer, TERMS)] for _, pointer in sources]
    most = tree(_largest, [largest for largest, _ in terms])
    shares = [ptx.exp2(ptx.subtract(largest, most)) for largest, _ in terms]
    weight = tree(ptx.add, [ptx.multiply(own, share) for (_, own), share in zip(terms, shares, strict=True)])
    for first in range(0, plan.head_dim, WARPGROUP):
        element = ptx.plus(thread, first)
        with ptx.when(ptx.less(element, plan.head_dim)):
            values = [ptx.as_float(ptx.load(ptx.advance_far(source, element, 4), 1)[0]) for source, _ in sources]
            total = tree(ptx.add, [ptx.multiply(*pair) for pair in zip(values, shares, strict=True)])
            at = ptx.advance_far(target, element, jnp.dtype(dtype).itemsize)
            if terms_target is None:
                _store_number(at, ptx.divide(total, weight), dtype)
            else:
                ptx.store(at, [ptx.as_word(total)])
    if terms_target is not None:
        with ptx.when(ptx.equal(thread, 0)):
            ptx.store(terms_target, [ptx.as_word(most), ptx.as_word(weight)])


def _store_number(at: Pointer, number: Value, dtype: jnp.dtype) -> None:
    if jnp.dtype(dtype).itemsize == 4:
        ptx.store(at, [ptx.as_word(number)])
    else:
        ptx.store_half(at, ptx.rounded(PTX_TYPES[jnp.dtype(dtype).name], number))
