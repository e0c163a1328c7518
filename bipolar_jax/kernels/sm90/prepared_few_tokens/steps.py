"""The steps of the product of few tokens on arrays: device functions around `threads`, each with its twin in jnp.

A warpgroup's accumulators are [2 * 64, width], int32 or, with float scales of groups, float32: row 64 b + 16 w + i is
row i of block b of the part of warp w, and its sum over this warp's stages alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Num, Shaped

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import (
    SPLAT,
    VECTOR,
    WARPS,
    as_array,
    as_vector,
    numbers_of,
    only_word,
    scalar_of,
)
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR, TILE_TRANSFORMS
from bipolar_jax.kernels.sm90.prepared_few_tokens import float_threads, threads
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import (
    CHUNK,
    FINISH_ROWS,
    PARTS_AT_ONCE,
    RUN,
    FewTokensProblem,
)
from bipolar_jax.kernels.sm90.prepared_weights.float_scaling import scaled_products
from bipolar_jax.kernels.sm90.prepared_weights.token_order import TOKEN_WORDS
from bipolar_jax.packing.fields import PART_ROWS, STAGE, expand_part, positions_of

_ACCUMULATOR_ROWS = 2 * FINISH_ROWS
Sums = Num[Array, "128 width"]


def zero_sums(problem: FewTokensProblem) -> Sums:
    """Zeros to start a unit from."""
    return plgpu.layout_cast(jnp.zeros((_ACCUMULATOR_ROWS, problem.width), problem.sums_dtype), ACCUMULATOR)


def _float_products(problem: FewTokensProblem, words, terms, tokens):
    """Products of a slot's stages with float tokens, [parts, stages, PART_ROWS, m]; for twins."""
    stages = problem.tiling.stages
    dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16}[problem.recovery.kind]
    rows = tokens.reshape(*tokens.shape[:1], -1)[: problem.m, : stages * TOKEN_WORDS]
    numbers = lax.bitcast_convert_type(rows, dtype).reshape(problem.m, stages, STAGE)
    positions = positions_of(numbers, "floats").astype(jnp.float32)
    if problem.float_terms is not None:
        codes = expand_part(words, None).astype(jnp.float32)
        by_chunk = positions.reshape(problem.m, stages, problem.chunks, -1)
        products = scaled_products(codes, by_chunk, terms, problem.recovery.w_format, problem.float_terms)
        return problem.recovery.unit * products
    values = problem.recovery.expansion(problem.chunks, None).in_units(expand_part(words, terms), terms is not None)
    return jnp.einsum("psrk,msk->psrm", values, positions, precision=lax.Precision.HIGHEST)


def _multiply_slot_twin(problem: FewTokensProblem, sums, words, terms, tokens, warpgroup):
    terms = None if terms is None else terms[:, pl.ds(0, problem.tiling.stages)]
    slot = (words[...], terms, tokens[...])
    plgpu.commit_smem()  # for the race detector: orders these reads before the next load into the slot
    products = (_float_products if problem.float_tokens else _byte_products)(problem, *slot)
    return _add_products(problem, sums, products, warpgroup)


def _byte_products(problem: FewTokensProblem, words, terms, tokens):
    """Likewise with tokens of bytes."""
    tiling = problem.tiling
    expanded = expand_part(words, terms if problem.float_terms is None else None)
    token_bytes = lax.bitcast_convert_type(tokens, jnp.int8)
    token_bytes = token_bytes.reshape(*token_bytes.shape[:2], STAGE)[: problem.m, : tiling.stages]
    # At most 255 * 128 * 128 a stage: exact in float32.
    expanded, token_bytes = expanded.astype(jnp.float32), token_bytes.astype(jnp.float32)
    if problem.float_terms is None:
        return jnp.einsum("psrk,msk->psrm", expanded, token_bytes).astype(jnp.int32)
    by_chunk = token_bytes.reshape(problem.m, tiling.stages, problem.chunks, -1)
    return scaled_products(expanded, by_chunk, terms, problem.recovery.w_format, problem.float_terms)


def _add_products(problem: FewTokensProblem, sums, products, warpgroup):
    tiling = problem.tiling
    products = products.reshape(tiling.parts, tiling.depth, tiling.splits, PART_ROWS, problem.m)
    by_worker = jnp.sum(products, axis=1).swapaxes(0, 1).reshape(tiling.workers, PART_ROWS, problem.m)
    by_warp = jnp.pad(by_worker, ((0, tiling.warps - tiling.workers), (0, 0), (0, problem.width - problem.m)))
    mine = lax.dynamic_slice_in_dim(by_warp, WARPS * warpgroup, WARPS)
    return sums + mine.reshape(WARPS, 2, RUN, problem.width).swapaxes(0, 1).reshape(sums.shape)


@with_twin(_multiply_slot_twin)
def multiply_slot(problem: FewTokensProblem, sums: Sums, words, terms, tokens, warpgroup: Int[Array, ""]) -> Sums:
    """Adds the products of this warpgroup's stages of a slot; see `multiply_slot` of `threads`, `float_threads`."""
    refs = [words] if terms is None else [words, terms]

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATOR, SPLAT, plgpu.RefType(TILE_TRANSFORMS), *[plgpu.RefType()] * len(refs)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, problem.sums_dtype, layout=ACCUMULATOR),
    )
    def inline(_, sums, warpgroup, tokens, words, *terms):
        multiply = (float_threads if problem.float_tokens else threads).multiply_slot
        numbers = multiply(problem, numbers_of(sums), words, terms[0] if terms else None, tokens, scalar_of(warpgroup))
        is_signed = True if problem.sums_dtype == "int32" else None
        return as_array(numbers, sums.shape, ACCUMULATOR, is_signed=is_signed)

    return inline(sums, jnp.int32(warpgroup), tokens, *refs)


def _hand_over_twin(problem: FewTokensProblem, sums, chunk, target, warpgroup):
    columns = sums[:, CHUNK * chunk : CHUNK * (chunk + 1)]
    by_warp = columns.reshape(2, WARPS, RUN, CHUNK).swapaxes(0, 1).reshape(WARPS, PART_ROWS, CHUNK)
    for warp in range(WARPS):
        worker = WARPS * warpgroup + warp

        @when(worker < problem.tiling.workers)
        def _(worker=worker, warp=warp):
            target[worker] = by_warp[warp]


@with_twin(_hand_over_twin)
def hand_over(problem: FewTokensProblem, sums: Sums, chunk: int, target, warpgroup: Int[Array, ""]) -> None:
    """Stores this warpgroup's sums of a chunk in shared memory; see `threads.hand_over`."""

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, plgpu.RefType(), SPLAT))
    def inline(_, sums, target, warpgroup):
        threads.hand_over(problem, numbers_of(sums), chunk, target, scalar_of(warpgroup))

    inline(sums, target, jnp.int32(warpgroup))


def _add_up_twin(problem: FewTokensProblem, sums, totals):
    tiling = problem.tiling
    by_part = jnp.sum(sums[...].reshape(tiling.splits, tiling.parts, 2, RUN, CHUNK), axis=0)
    totals[:, pl.ds(0, RUN * tiling.parts)] = by_part.swapaxes(0, 1).reshape(2, RUN * tiling.parts, CHUNK)


@with_twin(_add_up_twin)
def add_up(problem: FewTokensProblem, sums, totals) -> None:
    """Adds up the sums of all warps; see `threads.add_up`. Of a cluster the totals are in global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def inline(_, sums, totals):
        threads.add_up(problem, sums, totals, ptx.GLOBAL if problem.tiling.cluster > 1 else ptx.SHARED)

    inline(sums, totals)


def _add_blocks_twin(problem: FewTokensProblem, by_block, totals):
    filled = pl.ds(0, RUN * problem.tiling.parts)
    totals[:, filled] = sum(array[:, filled] for array in by_block)


@with_twin(_add_blocks_twin)
def add_blocks(problem: FewTokensProblem, by_block: list[Any], totals) -> None:
    """Adds up the totals of the blocks of a cluster; see `threads.add_blocks`."""

    @plgpu.inline_mgpu(arg_types=tuple([plgpu.RefType()] * (1 + len(by_block))))
    def inline(_, totals, *by_block):
        threads.add_blocks(problem, list(by_block), totals)

    inline(totals, *by_block)


def _load_columns_twin(problem: FewTokensProblem, sources, unit):
    rows = jnp.arange(problem.tiling.rows, dtype=jnp.int32)
    parts = unit * problem.tiling.parts + rows // RUN
    columns = jnp.stack([problem.term_column(block, parts) + rows % RUN for block in range(2)])
    columns = jnp.minimum(columns, problem.n - 1).reshape(-1, WARPGROUP)
    return [source[...][turn] for turn in columns for source in jax.tree.leaves(sources)]


@with_twin(_load_columns_twin)
def load_columns(problem: FewTokensProblem, sources: Any, unit: Int[Array, ""]) -> list[Shaped[Array, "128"]]:
    """Loads the `ColumnTerms` of a unit; see `threads.load_columns`."""
    sources = jax.tree.leaves(sources)
    dtypes = [source.dtype for source in sources] * (2 * problem.tiling.rows // WARPGROUP)

    @plgpu.inline_mgpu(
        arg_types=(SPLAT, *[plgpu.RefType()] * len(sources)),
        return_type=[plgpu.ShapeDtypeStruct((WARPGROUP,), dtype, layout=VECTOR) for dtype in dtypes],
    )
    def inline(_, unit, *sources):
        words = threads.load_columns(problem, sources, scalar_of(unit))
        return [
            as_vector(word if dtype == jnp.int32 else ptx.as_float(word), dtype)
            for word, dtype in zip(words, dtypes, strict=True)
        ]

    return list(inline(jnp.int32(unit), *sources))


def _store_columns_twin(terms, targets):
    targets = jax.tree.leaves(targets)
    for i, target in enumerate(targets):
        target[...] = jnp.concatenate(terms[i :: len(targets)]).reshape(target.shape)


@with_twin(_store_columns_twin)
def store_columns(terms: list[Shaped[Array, "128"]], targets: Any) -> None:
    """Stores what `load_columns` loaded in shared memory; see `threads.store_columns`."""
    targets = jax.tree.leaves(targets)

    @plgpu.inline_mgpu(arg_types=(*[VECTOR] * len(terms), *[plgpu.RefType()] * len(targets)))
    def inline(_, *args):
        threads.store_columns([only_word(term) for term in args[: len(terms)]], args[len(terms) :])

    inline(*terms, *targets)


def _gather_tokens_twin(problem: FewTokensProblem, sources, targets):
    token = jnp.minimum(jnp.arange(problem.width, dtype=jnp.int32), problem.m - 1)
    for source, target in zip(jax.tree.leaves(sources), jax.tree.leaves(targets), strict=True):
        target[...] = source[...][token]


@with_twin(_gather_tokens_twin)
def gather_tokens(problem: FewTokensProblem, sources: Any, targets: Any) -> None:
    """Copies the `TokenTerms` to shared memory; see `threads.gather_tokens`."""
    sources, targets = jax.tree.leaves(sources), jax.tree.leaves(targets)
    if not sources:  # float activations have no terms
        return

    @plgpu.inline_mgpu(arg_types=tuple([plgpu.RefType()] * (2 * len(sources))))
    def inline(_, *refs):
        threads.gather_tokens(problem, refs[: len(sources)], refs[len(sources) :])

    inline(*sources, *targets)


def _load_residual_twin(problem: FewTokensProblem, residual, unit, chunk):
    token = jnp.minimum(chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32), problem.m - 1)
    loaded = []
    for group, block in problem.finished:
        for warp in range(WARPS):
            run = problem.first_in_half(block, unit * problem.tiling.parts + PARTS_AT_ONCE * group + warp)
            loaded.append(residual[:, pl.ds(jnp.minimum(run, problem.padded_half - RUN), RUN)][token])
    return loaded


@with_twin(_load_residual_twin)
def load_residual(
    problem: FewTokensProblem, residual, unit: Int[Array, ""], chunk: Int[Array, ""]
) -> list[Shaped[Array, "..."]]:
    """Loads what is added to a chunk: four arrays for each of `problem.finished`; see `threads.load_residual`."""
    word = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.int32, layout=VECTOR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT), return_type=[word] * (WARPS * len(problem.finished)))
    def inline(_, residual, unit, chunk):
        words = threads.load_residual(problem, residual, scalar_of(unit), scalar_of(chunk))
        return [as_vector(word, jnp.int32) for word in words]

    return list(inline(residual, jnp.int32(unit), jnp.int32(chunk)))


def _store_finished_twin(problem: FewTokensProblem, numbers, out, added, unit, block, group, chunk):
    count = min(CHUNK, problem.m - CHUNK * chunk)
    for warp in range(WARPS):
        in_unit = PARTS_AT_ONCE * group + warp
        part = unit * problem.tiling.parts + in_unit
        run = problem.first_in_half(block, part)
        first = run + (block * problem.padded_half if problem.halves > 1 else 0)

        @when((run < problem.padded_half) & (in_unit < problem.tiling.parts))
        def _(first=first, warp=warp):
            run_numbers = numbers[RUN * warp : RUN * (warp + 1), :count]
            at = (pl.ds(CHUNK * chunk, count), pl.ds(first, RUN))
            run_numbers = run_numbers.T.astype(problem.dtype)
            out[at] = run_numbers if added is None else run_numbers + added[warp][:count]


@with_twin(_store_finished_twin)
def store_finished(
    problem: FewTokensProblem,
    numbers: Array,
    out,
    added: list[Array] | None,
    unit: Int[Array, ""],
    block: int,
    group: int,
    chunk: int,
) -> None:
    """Stores [FINISH_ROWS, CHUNK] finished numbers plus the residual; see `threads.store_finished`.

    Args:
      added: the four arrays of `load_residual` for these rows, or None.
    """
    words = [] if added is None else added

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, SPLAT, plgpu.RefType(), *[VECTOR] * len(words)))
    def inline(_, numbers, unit, out, *added):
        words = [only_word(vector) for vector in added] or None
        threads.store_finished(problem, numbers_of(numbers), out, words, scalar_of(unit), block, group, chunk)

    inline(plgpu.layout_cast(numbers, ACCUMULATOR), jnp.int32(unit), out, *words)
