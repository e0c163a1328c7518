"""Decode attention: one new token of each sequence attends to the cache and enters it, in one pass over the cache.

A cluster of blocks takes the queries of one key head of one sequence. Its warpgroups take tiles of positions in turn,
up to the sequence's length; where a block is all of a cluster, it may take several sequences. TMA loads keys and values
into ring buffers. Each warp, or each of 16 rows, has its own softmax until the end; then these are reduced through
shared memory and blocks through global memory, in a fixed order, so that the result does not depend on timing.

Every block counts the new token as the cache will hold it, one of them with a weight, and one stores it. No block reads
what is written to the cache.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.sync import meet_block, meet_cluster, synchronize
from bipolar_jax.kernels.sm90.decode_attention.config import (
    MASKED_SCORE,
    ROWS,
    TERMS,
    AttentionPlan,
    plan_attention,
)
from bipolar_jax.kernels.sm90.decode_attention.new_token import (
    STAGED_ROWS,
    Heads,
    enter_cache,
    stage_token,
    store_token_total,
)
from bipolar_jax.kernels.sm90.decode_attention.reduce import store_contexts, store_rows, store_totals
from bipolar_jax.kernels.sm90.decode_attention.ring import KEYS, VALUES, CacheRing, ring_scratch
from bipolar_jax.kernels.sm90.decode_attention.sequences import OwnSequences
from bipolar_jax.kernels.sm90.decode_attention.steps import (
    CachedVector,
    add_values,
    as_cached,
    load_grids,
    load_rows,
    load_vector,
    products,
    rescale,
    start_sums,
    store_vector,
    to_rows,
)
from bipolar_jax.kernels.sm90.decode_attention.tiles import (
    add_tile,
    load_queries,
    start_tile_sums,
    store_tile_sums,
)
from bipolar_jax.kernels.unsupported import Unsupported


def decode_attention(
    projected: tuple[Float[Array, "batch _ head_dim"], ...],
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    layer: Int[Array, ""],
    lengths: Int[Array, " batch"],
    *,
    bits: int | None = None,
    tables: tuple[Float[Array, "batch half"], Float[Array, "batch half"]] | None = None,
    slopes: Float[Array, " heads"] | None = None,
    splits: int | None = None,
    sequences: int | None = None,
    warpgroups: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "batch heads head_dim"], tuple[Array, ...], tuple[Array, ...]]:
    """Attends to the positions below `lengths` and to the new token, and stores the token at position `lengths`.

    A sequence that fills the capacity attends to its cache alone, which is left unchanged. Source: FlashDecoding's
    split of the sequence (Dao et al. 2023); online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867.

    Args:
      projected: the new token's q, k and v, or one array with all their heads in this order. Consecutive query heads
        share a key head.
      keys, values: of the whole cache: numbers [layers, batch, kv_heads, capacity, head_dim]; or codes (4 bits: two a
        byte, of elements d and d + head_dim / 2), scales and zeros, as `models.kv_cache.quantized_heads` has them. They
        are updated in place if the caller donates them.
      layer: the cache's layer.
      lengths: positions of each sequence that the cache holds.
      bits: of the cache's codes, 8 or 4, or None for floats.
      tables: cosines and sines that q and k are rotated by, float32.
      slopes: ALiBi's; slope * position is added to the scaled scores.
      splits: blocks that divide a sequence, 1, 2, 4 or 8; None chooses.
      sequences: that a block takes in turn, a divisor of the batch; more than one only without splits; None chooses.
      warpgroups: of a block, 1 or, on tensor cores, 2; None chooses.
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      The attention's output, in the queries' dtype; keys; values.

    Raises:
      ValueError: shapes that do not fit.
      Unsupported: a float cache of another dtype; sizes that `plan_attention` refuses.
    """
    plan = _plan(projected, keys, bits, splits, sequences, warpgroups)
    batch, heads, kv_heads, head_dim = plan.batch, plan.heads, plan.kv_heads, plan.head_dim
    dtype = projected[0].dtype
    options, tree = jax.tree.flatten((projected, tables, None if slopes is None else slopes.astype(jnp.float32)))
    caches = [jax.new_ref(array) for array in (*keys, *values)]
    out, _, _ = launch_kernel(
        functools.partial(_kernel, plan, tree, len(caches)),
        out_type=[
            jax.ShapeDtypeStruct((batch, heads, head_dim), dtype),
            # Totals of the blocks that divide a sequence.
            jax.ShapeDtypeStruct((batch, heads, plan.splits, head_dim) if plan.splits > 1 else (1,), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, plan.splits, TERMS) if plan.splits > 1 else (1,), jnp.float32),
        ],
        grid=(kv_heads, batch // plan.sequences),
        grid_names=("kv_head", "sequence"),
        cluster=(plan.cluster,),
        cluster_names=("block",),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        scratch_types=_scratch(plan, keys[0].dtype, interpret is not None),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # powers of two
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="decode_attention",
        interpret=interpret,
    )(layer.reshape(1), lengths, *options, *caches)
    arrays = [jax.freeze(ref) for ref in caches]
    return out, tuple(arrays[: len(keys)]), tuple(arrays[len(keys) :])


def plan_decode_attention(
    projected: tuple[Float[Array, "batch _ head_dim"], ...],
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    layer: Int[Array, ""],
    lengths: Int[Array, " batch"],
    *,
    bits: int | None = None,
    tables: tuple[Float[Array, "batch half"], Float[Array, "batch half"]] | None = None,
    slopes: Float[Array, " heads"] | None = None,
) -> Plan:
    """What `decode_attention` would run for these operands; raises as it would."""
    del values, layer, lengths, tables, slopes
    plan = _plan(projected, keys, bits)
    numbers = keys[0].dtype.name if bits is None else f"{bits}-bit"
    kernel = f"one pass over a {numbers} cache, {plan.cluster} blocks a key head and sequence; writes the new token"
    return Plan(kernel, f"{plan.batch} tokens: bound by reading the cache", plan)


def _plan(
    projected: tuple[Float[Array, "batch _ head_dim"], ...],
    keys: tuple[Array, ...],
    bits: int | None,
    splits: int | None = None,
    sequences: int | None = None,
    warpgroups: int | None = None,
) -> AttentionPlan:
    """Raises as `decode_attention` says."""
    batch, _, head_dim = projected[0].shape
    dtype, (_, _, kv_heads, capacity, _) = projected[0].dtype, keys[0].shape
    heads = sum(x.shape[1] for x in projected) - 2 * kv_heads
    expected = [(heads, kv_heads, kv_heads), (heads + 2 * kv_heads,)]
    if heads < 1 or heads % kv_heads or tuple(x.shape[1] for x in projected) not in expected:
        shapes = ", ".join(str(x.shape) for x in projected)
        raise ValueError(f"heads of shapes {shapes} do not fit a cache of shape {keys[0].shape}")
    if bits is None and dtype != keys[0].dtype:
        raise Unsupported(f"heads are {dtype}, the cache has {keys[0].dtype}: XLA converts them")
    divided = splits, sequences, warpgroups
    return plan_attention(batch, heads, kv_heads, capacity, head_dim, keys[0].dtype, bits, *divided)


def _scratch(plan: AttentionPlan, dtype: jnp.dtype, is_interpreted: bool) -> dict:
    """Scratch specifications, keyed by the kernel's keyword arguments."""
    slots, arrived = ring_scratch(plan, dtype)
    staged = (plan.warpgroups, STAGED_ROWS, plan.staged_bytes // plan.itemsize)
    return dict(
        key_slots=slots,
        value_slots=slots,
        keys_arrived=arrived,
        values_arrived=arrived,
        token_rows=plgpu.SMEM(staged, dtype) if plan.on_tensor_cores else None,
        totals=plgpu.SMEM((plan.totals, plan.queries, plan.head_dim), jnp.float32),
        terms=plgpu.SMEM((plan.totals, plan.queries, TERMS), jnp.float32),
        warpgroups_done=plgpu.Barrier(num_arrivals=plan.warpgroups) if is_interpreted and plan.warpgroups > 1 else None,
        blocks_done=plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=plan.warpgroups)
        if is_interpreted
        else None,
    )


def _kernel(
    plan: AttentionPlan,
    tree,
    num_caches,
    layer,
    lengths,
    *refs,
    key_slots,
    value_slots,
    keys_arrived,
    values_arrived,
    token_rows,
    totals,
    terms,
    warpgroups_done,
    blocks_done,
):
    """The kernel of one warpgroup; `_scratch` describes the keyword arguments."""
    *options, out, sums_out, terms_out = refs
    options, caches = options[:-num_caches], options[-num_caches:]
    keys, values = caches[: num_caches // 2], caches[num_caches // 2 :]
    projected, tables, slopes = jax.tree.unflatten(tree, options)
    kv_head, block = (lax.axis_index(name) for name in ("kv_head", "block"))
    member, rank = lax.div(block, plan.splits), lax.rem(block, plan.splits)
    warpgroup = lax.axis_index("warpgroup") if plan.warpgroups > 1 else 0
    layer, own = layer[0], OwnSequences(plan, lengths, rank * plan.warpgroups + warpgroup)
    slots, arrived = (key_slots, value_slots), (keys_arrived, values_arrived)
    ring = CacheRing(plan, own, layer, kv_head, warpgroup, (keys[0], values[0]), slots, arrived)
    ring.start()

    def meet():
        """All warpgroups of the block."""
        if plan.warpgroups > 1:
            meet_block(warpgroups_done)
        else:
            synchronize()

    def attend(index):
        """One sequence, from its first tile to its context."""
        sequence, length, seen, start = (each(index) for each in (own.sequence, own.length, own.seen, own.start))
        first_position, first_loaded = (functools.partial(f, index) for f in (own.first_position, own.first_loaded))

        def over_turns(step, sums):
            return lax.fori_loop(0, own.turns(index), lambda turn, sums: step(start + turn, sums), sums)

        # (ref, first head) of each.
        if len(projected) == 3:
            q, k, v = ((ref, 0) for ref in projected)
        else:
            q, k, v = ((*projected, first) for first in (0, plan.heads, plan.heads + plan.kv_heads))
        # Beyond the group the last member repeats the group's last query.
        first_head, last_head = kv_head * plan.group + member * plan.queries, kv_head * plan.group + plan.group - 1
        heads = [jnp.minimum(first_head + i, last_head) for i in range(plan.queries)]
        own_tables = None if tables is None else [table.at[sequence] for table in tables]
        slope = None if slopes is None else [slopes[head] * math.log2(math.e) for head in heads]
        joins = length < plan.capacity
        at = (layer, sequence, kv_head, length)

        def by_tiles():
            """The sums by `tiles`, the new token by `new_token`; returns what stores it."""
            rows = token_rows.at[warpgroup]
            q_heads, k_head, v_head = (
                Heads(ref.at[sequence], first + head)
                for (ref, first), head in zip((q, k, v), (first_head, kv_head, kv_head), strict=True)
            )
            stage_token(plan, rows, q_heads, q[1] + last_head, k_head, v_head, own_tables)
            synchronize()
            queries = load_queries(plan, rows)

            @when(warpgroup == 0)
            def _():
                total = plan.totals - 1
                store_token_total(plan, rows, totals.at[total], terms.at[total], length, joins & (rank == 0), slope)

            def step(turn, sums):
                tiles = [ring.await_tile(kind, turn) for kind in (KEYS, VALUES)]
                sums = add_tile(plan, sums, queries, *tiles, first_loaded(turn), (first_position(turn), seen), slope)
                for kind in (KEYS, VALUES):
                    ring.reload(kind, turn)
                return sums

            of_warps = pl.ds(warpgroup * WARPS, WARPS)
            store_tile_sums(plan, over_turns(step, start_tile_sums(plan)), totals.at[of_warps], terms.at[of_warps])

            def enter():
                @when(warpgroup == plan.warpgroups - 1)
                def _():
                    enter_cache(plan, rows, keys[0].at[at], values[0].at[at])

            return enter

        def by_rows():
            """The sums by `steps`, the new token in every row; returns what stores it."""

            def vector(array, head, tables=None):
                ref, first = array
                return load_vector(plan, ref.at[sequence, first + head], tables)

            def new_token() -> tuple[CachedVector, CachedVector]:
                return as_cached(plan, vector(k, kv_head, own_tables)), as_cached(plan, vector(v, kv_head))

            queries = [tuple(half * plan.score_unit for half in vector(q, head, own_tables)) for head in heads]
            key, value = (cached.numbers() for cached in new_token())
            scores = [jnp.sum(query[0] * key[0] + query[1] * key[1], axis=0) for query in queries]
            if slope is not None:
                scores = [score + length.astype(jnp.float32) * each for score, each in zip(scores, slope, strict=True)]
            share = jnp.where(joins & (rank == 0), 1 / ROWS, 0.0)
            sums = [start_sums(plan, jnp.where(joins, score, MASKED_SCORE), value, share) for score in scores]
            query_sums = [None if plan.bits is None else jnp.sum(first + second, axis=0) for first, second in queries]
            wide_queries = [tuple(to_rows(plan, half) for half in query) for query in queries]
            slices = range(0, plan.positions, ROWS)

            def grids(arrays, first):
                if plan.bits is None:
                    return [None for _ in slices]
                scale, zero = (array.at[layer, sequence, kv_head] for array in arrays[1:])
                return [load_grids(plan, scale, zero, first + row) for row in slices]

            def step(turn, sums):
                first = first_loaded(turn)
                key_grids, value_grids = grids(keys, first), grids(values, first)
                tile = ring.await_tile(KEYS, turn)
                scores = [[] for _ in heads]
                for row, grid in zip(slices, key_grids, strict=True):
                    rows = load_rows(plan, tile, row)
                    position = first + row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plan.layout.reduce(1))
                    for i in range(len(heads)):
                        score = products(wide_queries[i], rows)
                        if grid is not None:
                            score = (score - grid[1] * query_sums[i]) * grid[0]
                        if slope is not None:
                            score = score + position.astype(jnp.float32) * slope[i]
                        counts_here = (position >= first_position(turn)) & (position < seen)
                        scores[i].append(jnp.where(counts_here, score, MASKED_SCORE))
                ring.reload(KEYS, turn)
                rescaled = [rescale(plan, *pair) for pair in zip(sums, scores, strict=True)]
                sums, weights = [pair[0] for pair in rescaled], [pair[1] for pair in rescaled]
                tile = ring.await_tile(VALUES, turn)
                for j, (row, grid) in enumerate(zip(slices, value_grids, strict=True)):
                    rows = load_rows(plan, tile, row)
                    pairs = zip(sums, weights, strict=True)
                    sums = [add_values(plan, each, weight[j], rows, grid) for each, weight in pairs]
                ring.reload(VALUES, turn)
                return sums

            store_rows(plan, over_turns(step, sums), totals, terms)
            entering = new_token()  # loaded here, under the way of the sums through shared memory

            def enter():
                for cached, arrays in zip(entering, (keys, values), strict=True):
                    store_vector(plan, cached, arrays, at)

            return enter

        enter = (by_tiles if plan.on_tensor_cores else by_rows)()
        meet()
        count = jnp.minimum(plan.group - member * plan.queries, plan.queries)
        queries_of_block = first_head, rank, count, warpgroup
        context, *by_block = (ref.at[sequence] for ref in ([out, sums_out, terms_out] if plan.splits > 1 else [out]))
        store_totals(plan, totals, terms, *(by_block or (context, None)), *queries_of_block)
        if plan.cluster > 1:
            meet_cluster(blocks_done)
        # No block loads from the cache any more.
        when(joins & (block == plan.cluster - 1))(enter)
        if plan.splits > 1:
            store_contexts(plan, *by_block, context, *queries_of_block)
        if plan.sequences > 1:
            meet()  # the totals have been read

    if plan.sequences == 1:
        attend(jnp.int32(0))
    else:
        pl.loop(0, plan.sequences)(attend)
