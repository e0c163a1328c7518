"""A tile of keys and one of values on the tensor cores: 16-bit floats, up to eight queries.

A warp has 16 of a tile's 64 positions, and a running softmax of its own for each query. Queries are the rows of the
instruction (`mma.m16n8k16`, of which eight rows are zero), positions its columns; then weights are its rows, and the
elements of values its columns. So scores are where the second product wants its weights, and no lane exchanges them. A
lane 4 g + q has the query g.

Tiles lie in blocks of 8 positions and 64 elements, each with TMA's swizzle of 128 bytes: `ldmatrix` reads eight rows of
a block without bank conflicts, and transposes values.

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
    START_SCORE,
    TERMS,
    TILE_COLUMNS,
    TILE_QUERIES,
    TILE_ROWS,
    WARP_POSITIONS,
    AttentionPlan,
)

TILE_TRANSFORMS = (plgpu.TilingTransform((TILE_ROWS, TILE_COLUMNS)), plgpu.SwizzleTransform(2 * TILE_COLUMNS))
_STEP = 16  # elements of an instruction of scores
_COLUMNS = 8  # of an instruction
_CHAINS = 2  # of dependent instructions that a score is the sum of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileSums:
    """The online softmax of a warp's positions, a query for every four lanes.

    Attributes:
      largest: largest score so far; scores are exponents of 2.
      weight: this lane's part of the sum of 2^(score - largest).
      values: weighted sums of values: of every eight of the head's elements a lane has 2 q and 2 q + 1.
    """

    largest: Float[Array, "128"]
    weight: Float[Array, "128"]
    values: Float[Array, " lanes_elements"]


def _numbers(count: int) -> Any:
    """Layout of an array of which each thread holds so many numbers."""
    return plgpu.Layout.WG_STRIDED((WARPGROUP * count,), vec_size=1)


def _type_of(count: int, dtype) -> Any:
    return plgpu.ShapeDtypeStruct((WARPGROUP * count,), dtype, layout=_numbers(count))


def _state_types(plan: AttentionPlan) -> list[Any]:
    vector = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR)
    return [vector, vector, _type_of(plan.head_dim // 4, jnp.float32)]


# In jnp a state has [WARPS, TILE_QUERIES, 4] for every lane, and values [WARPS, TILE_QUERIES, head_dim].


def _start_twin(plan: AttentionPlan) -> TileSums:
    values = jnp.zeros(WARPS * TILE_QUERIES * plan.head_dim)
    return TileSums(jnp.full(WARPGROUP, START_SCORE), jnp.zeros(WARPGROUP), values)


@with_twin(_start_twin)
def start_tile_sums(plan: AttentionPlan) -> TileSums:
    """Sums of nothing."""
    count = plan.head_dim // 4

    @plgpu.inline_mgpu(return_type=_state_types(plan))
    def inline(_):
        zero = ptx.float32(0)
        values = as_array([zero] * count, (WARPGROUP * count,), _numbers(count))
        return [as_vector(ptx.float32(START_SCORE), jnp.float32), as_vector(zero, jnp.float32), values]

    return TileSums(*inline())


def _load_queries_twin(plan: AttentionPlan, rows):
    loaded = rows[:TILE_QUERIES, : plan.head_dim].astype(jnp.float32)
    return jnp.where(jnp.arange(TILE_QUERIES)[:, None] < plan.queries, loaded, 0.0)  # the others are not initialized


@with_twin(_load_queries_twin)
def load_queries(plan: AttentionPlan, rows: Any) -> Num[Array, "..."]:
    """The operand of all tiles' scores: the first TILE_QUERIES of `new_token`'s rows in shared memory."""
    count = plan.head_dim // 8

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_type_of(count, jnp.int32))
    def inline(_, rows):
        words = load_queries_of_warp(plan, ptx.pointer(rows, ptx.SHARED))
        return as_array(words, (WARPGROUP * count,), _numbers(count), is_signed=True)

    return inline(rows)


def _add_tile_twin(plan, sums, queries, keys, values, first, counted, slopes):
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
    by_warp = values[...].astype(jnp.float32).reshape(WARPS, WARP_POSITIONS, plan.head_dim)
    products = jnp.einsum("wqp,wpd->wqd", weights, by_warp, precision="highest")
    totals = sums.values.reshape(WARPS, TILE_QUERIES, plan.head_dim) * shrink[..., :1] + products
    return TileSums(largest.reshape(-1), weight.reshape(-1), totals.reshape(-1))


@with_twin(_add_tile_twin)
def add_tile(
    plan: AttentionPlan,
    sums: TileSums,
    queries: Num[Array, "..."],
    keys: Any,
    values: Any,
    first: Int[Array, ""],
    counted: tuple[Int[Array, ""], Int[Array, ""]],
    slopes: Sequence[Float[Array, ""]] | None,
) -> TileSums:
    """The sums with a tile's positions.

    Args:
      plan: of the kernel.
      sums: so far.
      queries: of `load_queries`.
      keys, values: [positions, head_dim] in shared memory, transformed by TILE_TRANSFORMS.
      first: position of the first key.
      counted: the first position that has a weight, and the one behind the last.
      slopes: ALiBi's, by query, or None.
    """
    count, kind = plan.head_dim // 4, PTX_TYPES[jnp.dtype(keys.dtype).name]
    slopes = [] if slopes is None else slopes
    tile = plgpu.RefType(TILE_TRANSFORMS)
    state = (VECTOR, VECTOR, _numbers(count), _numbers(count // 2))

    @plgpu.inline_mgpu(
        arg_types=(*state, tile, tile, *[SPLAT] * (3 + len(slopes))),
        return_type=_state_types(plan),
    )
    def inline(_, largest, weight, sums, queries, keys, values, *numbers):
        first, start, end, *slopes = map(scalar_of, numbers)
        slope = of_own_query(slopes) if slopes else None
        keys, values = (ptx.pointer(ref, ptx.SHARED) for ref in (keys, values))
        scores = scores_of_warp(plan, kind, numbers_of(queries), keys)
        words = load_values_of_warp(plan, values)  # under way while weights are computed
        state = numbers_of(largest)[0], numbers_of(weight)[0], numbers_of(sums)
        largest, weight, sums, weights = weigh_of_warp(plan, kind, *state, scores, first, start, end, slope)
        sums = add_values_of_warp(kind, sums, weights, words)
        return [
            as_vector(largest, jnp.float32),
            as_vector(weight, jnp.float32),
            as_array(sums, (WARPGROUP * count,), _numbers(count)),
        ]

    operands = (sums.largest, sums.weight, sums.values, queries, keys, values, *map(jnp.int32, (first, *counted)))
    return TileSums(*inline(*operands, *slopes))


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


def load_queries_of_warp(plan: AttentionPlan, rows: Pointer) -> list[Value]:
    """The lane's words of its query: for each step of 16 elements, those of the first eight and of the others."""
    matrix, row = _matrix_and_row()
    at = ptx.plus(ptx.times(row, plan.staged_bytes), ptx.times(matrix, 16))
    return [
        word
        for step in range(0, 2 * plan.head_dim, 64)
        for word in ptx.load_matrices(ptx.advance(rows, ptx.plus(at, step)))
    ]


def scores_of_warp(plan: AttentionPlan, kind: str, queries: list[Value], keys: Pointer) -> list[Value]:
    """Products of queries and keys: of the lane's query, positions 2 q and 2 q + 1 of the warp's, and 8 further on."""
    matrix, _ = _matrix_and_row()
    zero = ptx.int32(0)
    # Of every 16 elements: the first eight of 8 positions, the others, and both of the next 8 positions.
    words = _load_tile(plan, keys, ptx.shift_right(matrix, 1), ptx.bits_of(matrix, 1), transposed=False)
    blocks = [[[ptx.float32(0)] * 4 for _ in range(_CHAINS)] for _ in range(WARP_POSITIONS // _COLUMNS)]
    for step, of_step in enumerate(words):
        first, second = queries[2 * step : 2 * step + 2]
        for block, chains in enumerate(blocks):
            chain = chains[step % _CHAINS]
            pair = of_step[2 * block : 2 * block + 2]
            own = ptx.multiply_add_tiles(kind, [first, zero, second, zero], pair, chain)
            chains[step % _CHAINS] = [*own[:2], *chain[2:]]
    return [ptx.add(*pair) for chains in blocks for pair in zip(chains[0][:2], chains[1][:2], strict=True)]


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


def load_values_of_warp(plan: AttentionPlan, values: Pointer) -> list[list[Value]]:
    """Words of the warp's values, transposed: for every 8 elements two of positions, the operand of an instruction."""
    matrix, _ = _matrix_and_row()
    # Of every 16 elements: the first eight of 8 positions, those of the next 8 positions, and both of the others.
    words = _load_tile(plan, values, ptx.bits_of(matrix, 1), ptx.shift_right(matrix, 1), transposed=True)
    return [of_step[start : start + 2] for of_step in words for start in (0, 2)]


def add_values_of_warp(kind: str, sums: list[Value], weights: list[Value], values: list[list[Value]]) -> list[Value]:
    """The sums with weighted values; a lane has elements 2 q and 2 q + 1 of every eight."""
    zero, nothing = ptx.int32(0), ptx.float32(0)
    added = [
        ptx.multiply_add_tiles(kind, [weights[0], zero, weights[1], zero], words, [*own, nothing, nothing])[:2]
        for words, own in zip(values, zip(sums[::2], sums[1::2], strict=True), strict=True)
    ]
    return [number for pair in added for number in pair]


def store_tile_sums_of_warp(
    plan: AttentionPlan, largest: Value, weight: Value, values: list[Value], totals: Pointer, terms: Pointer
) -> None:
    """The thread's part of `store_tile_sums`."""
    query, part = _query_and_part()
    _, warp = lane_and_warp()
    for distance in (1, 2):
        weight = ptx.add(weight, ptx.as_float(ptx.exchange(ptx.as_word(weight), distance)))
    index = ptx.plus(ptx.times(warp, plan.queries), query)
    with ptx.when(ptx.less(query, plan.queries)):
        with ptx.when(ptx.equal(part, 0)):
            ptx.store(ptx.advance(terms, ptx.times(index, 4 * TERMS)), [ptx.as_word(largest), ptx.as_word(weight)])
        target = ptx.advance(totals, ptx.plus(ptx.times(index, 4 * plan.head_dim), ptx.times(part, 8)))
        for block in range(len(values) // 2):
            at = ptx.advance(target, 4 * _COLUMNS * block)
            ptx.store(at, [ptx.as_word(number) for number in values[2 * block : 2 * block + 2]])


def _query_and_part() -> tuple[Value, Value]:
    """g and q of the lane 4 g + q: its query, or the column of an operand; and which of four lanes it is."""
    lane, _ = lane_and_warp()
    return ptx.shift_right(lane, 2), ptx.bits_of(lane, 3)


def _first_of_warp() -> Value:
    return ptx.times(lane_and_warp()[1], WARP_POSITIONS)


def _matrix_and_row() -> tuple[Value, Value]:
    """Of which of four matrices the lane points to a row, and to which row."""
    lane, _ = lane_and_warp()
    return ptx.shift_right(lane, 3), ptx.bits_of(lane, 7)


def _load_tile(
    plan: AttentionPlan, tile: Pointer, positions: Value, elements: Value, *, transposed: bool
) -> list[list[Value]]:
    """Four matrices of 8 x 8 of every 16 elements of the warp's positions.

    Args:
      plan: of the kernel.
      tile: in shared memory, transformed by TILE_TRANSFORMS.
      positions, elements: 0 or 1, whether the lane points to the second eight positions, and elements.
      transposed: whether matrices are.
    """
    _, row = _matrix_and_row()
    load = ptx.load_transposed if transposed else ptx.load_matrices
    block = ptx.plus(ptx.times(lane_and_warp()[1], WARP_POSITIONS // TILE_ROWS), positions)
    row_bytes = 2 * TILE_COLUMNS
    start = ptx.plus(ptx.times(block, TILE_ROWS * plan.row_bytes), ptx.times(row, row_bytes))
    start = ptx.plus(start, ptx.times(ptx.flip_bits(elements, row), 16))  # the swizzle
    words = []
    for step in range(plan.head_dim // _STEP):
        columns, segment = divmod(_STEP * step, TILE_COLUMNS)
        at = ptx.plus(ptx.flip_bits(start, 2 * segment), columns * TILE_ROWS * row_bytes)
        words.append(load(ptx.advance(tile, at)))
    return words


def _larger(a: Value, b: Value) -> Value:
    return ptx.as_float(ptx.extreme("max", "f32", ptx.as_word(a), ptx.as_word(b)))
