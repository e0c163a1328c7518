"""A tile of keys and one of values on the tensor cores: 16-bit floats, up to eight queries.

A warp has 16 of a tile's 64 positions, and a running softmax of its own for each query. Queries are the rows of the
instruction (`mma.m16n8k16`, of which eight rows are zero), positions its columns; then weights are its rows, and the
elements of values its columns. So scores are where the second product wants its weights, and no lane exchanges them. A
lane 4 g + q has the query g.

Which elements meet in an instruction is free as long as both operands agree: a lane loads 16 bytes at a time.

The functions on arrays have twins in jnp; those on the state of a warp use `core.ptx` alone, so that tests run them for
all threads in numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    SPLAT,
    VECTOR,
    WARPS,
    as_array,
    as_vector,
    lane_and_warp,
    numbers_of,
    scalar_of,
)
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES, WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.decode_attention.config import (
    MASKED_SCORE,
    TERMS,
    TILE_QUERIES,
    WARP_POSITIONS,
    AttentionPlan,
)

_COLUMNS = 8  # of an instruction
_SEGMENT = 16  # bytes: what a lane loads at once, eight elements
_STEPS_OF_SEGMENT = 2  # instructions of 16 elements that four lanes' segments feed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileSums:
    """The online softmax of a warp's positions, a query for every four lanes.

    Attributes:
      largest: largest score so far; scores are exponents of 2.
      weight: this lane's part of the sum of 2^(score - largest).
      values: weighted sums of values: of every eight of the head's elements a lane has two.
    """

    largest: Float[Array, "128"]
    weight: Float[Array, "128"]
    values: Float[Array, " lanes_elements"]


def _numbers(count: int) -> Any:
    """Layout of an array of which each thread holds so many numbers."""
    return plgpu.Layout.WG_STRIDED((WARPGROUP * count,), vec_size=1)


def _type_of(plan: AttentionPlan, count: int, dtype) -> Any:
    return plgpu.ShapeDtypeStruct((WARPGROUP * count,), dtype, layout=_numbers(count))


# In jnp a state has [WARPS, TILE_QUERIES, 4] for every lane, and values [WARPS, TILE_QUERIES, head_dim].


def _start_twin(plan: AttentionPlan, scores) -> TileSums:
    by_query = jnp.stack([*scores, *[scores[-1]] * (TILE_QUERIES - len(scores))])
    lanes = (WARPS, TILE_QUERIES, 4)
    largest = jnp.broadcast_to(by_query[None, :, None], lanes).reshape(-1)
    return TileSums(largest, jnp.zeros(WARPGROUP), jnp.zeros(WARPS * TILE_QUERIES * plan.head_dim))


@with_twin(_start_twin)
def start_tile_sums(plan: AttentionPlan, scores: Sequence[Float[Array, ""]]) -> TileSums:
    """Sums of nothing, whose largest score is that of the new token, by query."""
    count = plan.head_dim // 4

    @plgpu.inline_mgpu(
        arg_types=(SPLAT,) * len(scores),
        return_type=[
            plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
            plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
            _type_of(plan, count, jnp.float32),
        ],
    )
    def inline(_, *scores):
        zero = ptx.float32(0)
        largest = as_vector(of_own_query([scalar_of(score) for score in scores]), jnp.float32)
        values = as_array([zero] * count, (WARPGROUP * count,), _numbers(count))
        return [largest, as_vector(zero, jnp.float32), values]

    return TileSums(*inline(*scores))


def _load_queries_twin(plan: AttentionPlan, queries):
    loaded = queries[...].astype(jnp.float32)
    return jnp.where(jnp.arange(TILE_QUERIES)[:, None] < plan.queries, loaded, 0.0)  # the others are not initialized


@with_twin(_load_queries_twin)
def load_queries(plan: AttentionPlan, queries: Any) -> Num[Array, "..."]:
    """The operand of all tiles' scores: queries [TILE_QUERIES, head_dim] in shared memory, of 16-bit floats."""
    count = plan.head_dim // 8

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_type_of(plan, count, jnp.int32))
    def inline(_, queries):
        words = load_queries_of_warp(plan, ptx.pointer(queries, ptx.SHARED))
        return as_array(words, (WARPGROUP * count,), _numbers(count), is_signed=True)

    return inline(queries)


def _score_tile_twin(plan, sums, queries, keys, first, counted, slopes):
    scores = jnp.dot(queries, keys[...].astype(jnp.float32).T, precision="highest") * plan.score_unit
    position = first + jnp.arange(plan.positions, dtype=jnp.int32)
    if slopes is not None:
        by_query = jnp.stack([*slopes, *[slopes[-1]] * (TILE_QUERIES - len(slopes))])
        scores = scores + position.astype(jnp.float32)[None] * by_query[:, None]
    counts = (position >= counted[0]) & (position < counted[1])
    scores = jnp.where(counts[None], scores, MASKED_SCORE)
    scores = scores.reshape(TILE_QUERIES, WARPS, WARP_POSITIONS).transpose(1, 0, 2)
    before = sums.largest.reshape(WARPS, TILE_QUERIES, 4)
    largest = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
    shrink = jnp.exp2(before - largest)
    weights = jnp.exp2(scores - largest[..., :1]).astype(keys.dtype).astype(jnp.float32)
    total = jnp.sum(weights.reshape(WARPS, TILE_QUERIES, -1, 4), axis=2)
    weight = sums.weight.reshape(shrink.shape) * shrink + total
    values = sums.values.reshape(WARPS, TILE_QUERIES, plan.head_dim) * shrink[..., :1]
    return TileSums(largest.reshape(-1), weight.reshape(-1), values.reshape(-1)), weights


@with_twin(_score_tile_twin)
def score_tile(
    plan: AttentionPlan,
    sums: TileSums,
    queries: Num[Array, "..."],
    keys: Any,
    first: Int[Array, ""],
    counted: tuple[Int[Array, ""], Int[Array, ""]],
    slopes: Sequence[Float[Array, ""]] | None,
) -> tuple[TileSums, Num[Array, "..."]]:
    """Scores of a tile: the sums rescaled to include them, without its values; and the weights, for `add_tile`.

    Args:
      plan: of the kernel.
      sums: so far.
      queries: of `load_queries`.
      keys: [positions, head_dim] in shared memory.
      first: position of the first key.
      counted: the first position that has a weight, and the one behind the last.
      slopes: ALiBi's, by query, or None.
    """
    count, kind = plan.head_dim // 4, PTX_TYPES[jnp.dtype(keys.dtype).name]
    slopes = [] if slopes is None else slopes

    @plgpu.inline_mgpu(
        arg_types=(
            VECTOR,
            VECTOR,
            _numbers(count),
            _numbers(count // 2),
            plgpu.RefType(),
            *[SPLAT] * (3 + len(slopes)),
        ),
        return_type=[
            plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
            plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
            _type_of(plan, count, jnp.float32),
            _type_of(plan, 2, jnp.int32),
        ],
    )
    def inline(_, largest, weight, values, queries, keys, first, start, end, *slopes):
        state = [numbers_of(largest)[0], numbers_of(weight)[0], numbers_of(values)]
        numbers = [scalar_of(number) for number in (first, start, end)]
        slope = of_own_query([scalar_of(slope) for slope in slopes]) if slopes else None
        pointer = ptx.pointer(keys, ptx.SHARED)
        scores = scores_of_warp(plan, kind, numbers_of(queries), pointer)
        largest, weight, values, words = weigh_of_warp(plan, kind, *state, scores, *numbers, slope)
        return [
            as_vector(largest, jnp.float32),
            as_vector(weight, jnp.float32),
            as_array(values, (WARPGROUP * count,), _numbers(count)),
            as_array(words, (WARPGROUP * 2,), _numbers(2), is_signed=True),
        ]

    operands = (sums.largest, sums.weight, sums.values, queries, keys, *map(jnp.int32, (first, *counted)))
    largest, weight, values, words = inline(*operands, *slopes)
    return TileSums(largest, weight, values), words


def _add_tile_twin(plan, sums, weights, values):
    by_warp = values[...].astype(jnp.float32).reshape(WARPS, WARP_POSITIONS, plan.head_dim)
    products = jnp.einsum("wqp,wpd->wqd", weights, by_warp, precision="highest")
    return dataclasses.replace(sums, values=sums.values + products.reshape(-1))


@with_twin(_add_tile_twin)
def add_tile(plan: AttentionPlan, sums: TileSums, weights: Num[Array, "..."], values: Any) -> TileSums:
    """Adds the weighted values of a tile, [positions, head_dim] in shared memory."""
    count, kind = plan.head_dim // 4, PTX_TYPES[jnp.dtype(values.dtype).name]

    @plgpu.inline_mgpu(
        arg_types=(_numbers(count), _numbers(2), plgpu.RefType()), return_type=_type_of(plan, count, jnp.float32)
    )
    def inline(_, sums, weights, values):
        pointer = ptx.pointer(values, ptx.SHARED)
        added = add_values_of_warp(plan, kind, numbers_of(sums), numbers_of(weights), pointer)
        return as_array(added, (WARPGROUP * count,), _numbers(count))

    return dataclasses.replace(sums, values=inline(sums.values, weights, values))


def _store_tile_sums_twin(plan, sums, totals, terms):
    values = sums.values.reshape(WARPS, TILE_QUERIES, plan.head_dim)
    for warp in range(WARPS):
        totals[warp] = values[warp, : plan.queries]
        lanes = [term.reshape(WARPS, TILE_QUERIES, 4)[warp, : plan.queries] for term in (sums.largest, sums.weight)]
        terms[warp] = jnp.stack([lanes[0][:, 0], jnp.sum(lanes[1], axis=1)], axis=-1)


@with_twin(_store_tile_sums_twin)
def store_tile_sums(plan: AttentionPlan, sums: TileSums, totals: Any, terms: Any) -> None:
    """Stores the totals of every warp, as `reduce.store_rows` does.

    Args:
      plan: of the kernel.
      sums: of all tiles.
      totals, terms: float32 [warps or more, queries, head_dim] and [..., queries, TERMS] in shared memory.
    """

    @plgpu.inline_mgpu(arg_types=(VECTOR, VECTOR, _numbers(plan.head_dim // 4), plgpu.RefType(), plgpu.RefType()))
    def inline(_, largest, weight, values, totals, terms):
        pointers = [ptx.pointer(ref, ptx.SHARED) for ref in (totals, terms)]
        store_tile_sums_of_warp(plan, numbers_of(largest)[0], numbers_of(weight)[0], numbers_of(values), *pointers)

    inline(sums.largest, sums.weight, sums.values, totals, terms)


# Below: for use within `plgpu.inline_mgpu`.


def of_own_query(numbers: Sequence[Value]) -> Value:
    """The number of the lane's query; lanes of queries that do not exist have the last one."""
    query, own = _query_and_part()[0], numbers[-1]
    for index, number in enumerate(numbers[:-1]):
        own = ptx.choose(ptx.equal(query, index), number, own)
    return own


def load_queries_of_warp(plan: AttentionPlan, queries: Pointer) -> list[Value]:
    """The lane's words of its query, in the order of `scores_of_warp`."""
    query, part = _query_and_part()
    return _load_row(plan, queries, query, part)


def scores_of_warp(plan: AttentionPlan, kind: str, queries: list[Value], keys: Pointer) -> list[Value]:
    """Products of queries and keys: of the lane's query, positions 2 q and 2 q + 1 of the warp's, and 8 further on."""
    column, part = _query_and_part()
    zero, scores = ptx.int32(0), []
    for block in range(WARP_POSITIONS // _COLUMNS):
        words = _load_row(plan, keys, ptx.plus(_first_of_warp(), ptx.plus(column, _COLUMNS * block)), part)
        chains = [[ptx.float32(0)] * 4 for _ in range(_STEPS_OF_SEGMENT)]  # half as long as one would be
        for step in range(len(words) // 2):
            first, second = queries[2 * step : 2 * step + 2]
            chain = chains[step % _STEPS_OF_SEGMENT]
            own = ptx.multiply_add_tiles(kind, [first, zero, second, zero], words[2 * step : 2 * step + 2], chain)
            chains[step % _STEPS_OF_SEGMENT] = [*own[:2], *chain[2:]]
        scores += [ptx.add(*pair) for pair in zip(chains[0][:2], chains[1][:2], strict=True)]
    return scores


def weigh_of_warp(
    plan: AttentionPlan,
    kind: str,
    largest: Value,
    weight: Value,
    values: list[Value],
    scores: list[Value],
    first: Value,
    counted_from: Value,
    counted_to: Value,
    slope: Value | None,
) -> tuple[Value, Value, list[Value], list[Value]]:
    """The thread's part of `score_tile` once it has products; the last are words of two 16-bit weights."""
    _, part = _query_and_part()
    start = ptx.plus(ptx.plus(first, _first_of_warp()), ptx.times(part, 2))
    own = []
    for index, score in enumerate(scores):
        position = ptx.plus(start, index // 2 * _COLUMNS + index % 2)
        score = ptx.multiply(score, ptx.float32(plan.score_unit))
        if slope is not None:
            score = ptx.fma(ptx.from_int(position), slope, score)
        counts = ptx.bits_of(ptx.less(position, counted_to), ptx.less(ptx.plus(counted_from, -1), position))
        own.append(ptx.choose(counts, score, ptx.float32(MASKED_SCORE)))
    new = largest
    for score in own:
        new = _larger(new, score)
    for distance in (1, 2):
        new = _larger(new, ptx.as_float(ptx.exchange(ptx.as_word(new), distance)))
    shrink = ptx.exp2(ptx.subtract(largest, new))
    # Rounded before they are added up, so that the weights that are used add up to 1.
    rounded = [ptx.rounded(kind, ptx.exp2(ptx.subtract(score, new))) for score in own]
    weight = ptx.multiply(weight, shrink)
    for word in rounded:
        weight = ptx.add(weight, ptx.expand(kind, word)[0])
    words = [ptx.pick_bytes(*rounded[i : i + 2], 0x5410) for i in range(0, len(rounded), 2)]
    return new, weight, [ptx.multiply(value, shrink) for value in values], words


def add_values_of_warp(
    plan: AttentionPlan, kind: str, sums: list[Value], weights: list[Value], values: Pointer
) -> list[Value]:
    """The thread's part of `add_tile`.

    Column g of the instruction for element e of a segment is element e of the g-th segment of 128 bytes: a lane loads
    its segment of the four positions whose weights it has beside it, and sorts pairs by position.
    """
    column, part = _query_and_part()
    zero, sums = ptx.int32(0), list(sums)
    first = ptx.plus(_first_of_warp(), ptx.times(part, 2))
    rows = [
        ptx.advance(
            ptx.advance(values, ptx.times(ptx.plus(first, position), plan.row_bytes)), ptx.times(column, _SEGMENT)
        )
        for position in (0, 1, _COLUMNS, _COLUMNS + 1)
    ]
    for segment in range(plan.row_bytes // (_COLUMNS * _SEGMENT)):
        words = [ptx.load(ptx.advance(row, _COLUMNS * _SEGMENT * segment), _SEGMENT // 4) for row in rows]
        for element in range(_SEGMENT // 2):
            selector = 0x7632 if element % 2 else 0x5410
            pairs = [ptx.pick_bytes(a[element // 2], b[element // 2], selector) for a, b in (words[:2], words[2:])]
            start = 2 * (segment * _SEGMENT // 2 + element)
            added = [*sums[start : start + 2], ptx.float32(0), ptx.float32(0)]
            added = ptx.multiply_add_tiles(kind, [weights[0], zero, weights[1], zero], pairs, added)
            sums[start : start + 2] = added[:2]
    return sums


def store_tile_sums_of_warp(
    plan: AttentionPlan, largest: Value, weight: Value, values: list[Value], totals: Pointer, terms: Pointer
) -> None:
    """The thread's part of `store_tile_sums`: 16 neighbouring elements of every 64 are this lane's."""
    query, part = _query_and_part()
    _, warp = lane_and_warp()
    for distance in (1, 2):
        weight = ptx.add(weight, ptx.as_float(ptx.exchange(ptx.as_word(weight), distance)))
    index = ptx.plus(ptx.times(warp, plan.queries), query)
    with ptx.when(ptx.less(query, plan.queries)):
        with ptx.when(ptx.equal(part, 0)):
            ptx.store(ptx.advance_far(terms, index, 4 * TERMS), [ptx.as_word(largest), ptx.as_word(weight)])
        target = ptx.advance_far(totals, ptx.plus(ptx.times(index, plan.head_dim), ptx.times(part, 16)), 4)
        per_segment = _SEGMENT // 2
        for segment in range(len(values) // (2 * per_segment)):
            own = values[2 * per_segment * segment : 2 * per_segment * (segment + 1)]
            ordered = own[0::2] + own[1::2]
            for start in range(0, len(ordered), 4):
                at = ptx.advance(target, 4 * (_COLUMNS * per_segment * segment + start))
                ptx.store(at, [ptx.as_word(number) for number in ordered[start : start + 4]])


def _query_and_part() -> tuple[Value, Value]:
    """g and q of the lane 4 g + q: its query, or the column of an operand; and which of four lanes it is."""
    lane, _ = lane_and_warp()
    return ptx.shift_right(lane, 2), ptx.bits_of(lane, 3)


def _first_of_warp() -> Value:
    return ptx.times(lane_and_warp()[1], WARP_POSITIONS)


def _load_row(plan: AttentionPlan, rows: Pointer, row: Value, part: Value) -> list[Value]:
    """The lane's segments of a row: of every four the one that it is among four lanes."""
    start = ptx.advance(ptx.advance(rows, ptx.times(row, plan.row_bytes)), ptx.times(part, _SEGMENT))
    return [
        word
        for segment in range(plan.row_bytes // (4 * _SEGMENT))
        for word in ptx.load(ptx.advance(start, 4 * _SEGMENT * segment), _SEGMENT // 4)
    ]


def _larger(a: Value, b: Value) -> Value:
    return ptx.as_float(ptx.extreme("max", "f32", ptx.as_word(a), ptx.as_word(b)))
