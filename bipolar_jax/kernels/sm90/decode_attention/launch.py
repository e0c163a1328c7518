"""Decode attention: one new token of each sequence attends to the cache and enters it, in one pass over the cache.

A cluster of blocks takes the queries of one key head of one sequence. Its blocks, a warpgroup each, take tiles of
positions in turn, up to the sequence's length; where a block is all of a cluster, it may take several sequences. TMA
loads keys and values into ring buffers, and they are widened in registers. Each of 16 rows has its own softmax until
the end; then rows are reduced through shared memory and blocks through global memory, in a fixed order, so that the
result does not depend on timing.

The sums start from the new token: every block computes it as the cache will hold it, and one block stores it. No block
reads what is written to the cache.
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
from bipolar_jax.kernels.sm90.core.emulation import is_interpreted, launch_kernel
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.sync import meet_cluster, synchronize
from bipolar_jax.kernels.sm90.decode_attention.config import (
    MASKED_SCORE,
    ROWS,
    TERMS,
    TILE_QUERIES,
    AttentionPlan,
    plan_attention,
)
from bipolar_jax.kernels.sm90.decode_attention.reduce import store_contexts, store_rows, store_totals
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
    score_tile,
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
      interpret: parameters of interpret mode, for tests on a CPU.

    Returns:
      The attention's output, in the queries' dtype; keys; values.

    Raises:
      ValueError: shapes that do not fit.
      Unsupported: a float cache of another dtype; sizes that `plan_attention` refuses.
    """
    plan = _plan(projected, keys, bits, splits, sequences)
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
        num_threads=1,
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
    return plan_attention(batch, heads, kv_heads, capacity, head_dim, keys[0].dtype, bits, splits, sequences)


def _scratch(plan: AttentionPlan, dtype: jnp.dtype, is_interpreted: bool) -> dict:
    """Scratch specifications, keyed by the kernel's keyword arguments."""
    ring = plgpu.SMEM((plan.slots, plan.positions, plan.row_bytes // plan.itemsize), dtype)
    return dict(
        key_ring=ring,
        value_ring=ring,
        keys_arrived=plgpu.Barrier(num_barriers=plan.slots),
        values_arrived=plgpu.Barrier(num_barriers=plan.slots),
        query_rows=plgpu.SMEM((TILE_QUERIES, plan.head_dim), dtype) if plan.on_tensor_cores else None,
        totals=plgpu.SMEM((plan.totals, plan.queries, plan.head_dim), jnp.float32),
        terms=plgpu.SMEM((plan.totals, plan.queries, TERMS), jnp.float32),
        blocks_done=plgpu.ClusterBarrier(collective_axes=("block",)) if is_interpreted else None,
    )


def _kernel(
    plan: AttentionPlan,
    tree,
    num_caches,
    layer,
    lengths,
    *refs,
    key_ring,
    value_ring,
    keys_arrived,
    values_arrived,
    query_rows,
    totals,
    terms,
    blocks_done,
):
    """The kernel of one block; `_scratch` describes the keyword arguments."""
    *options, out, sums_out, terms_out = refs
    options, caches = options[:-num_caches], options[-num_caches:]
    keys, values = caches[: num_caches // 2], caches[num_caches // 2 :]
    projected, tables, slopes = jax.tree.unflatten(tree, options)
    kv_head, block = (lax.axis_index(name) for name in ("kv_head", "block"))
    member, rank = lax.div(block, plan.splits), lax.rem(block, plan.splits)
    layer, own = layer[0], OwnSequences(plan, lengths, rank)

    def load(turn, source, ring, arrived):
        @pl.when(turn < own.all_turns)
        def _():
            # [positions, elements]: contiguous, so that one bulk copy of bytes does.
            index, slot = own.of_turn(turn), lax.rem(turn, plan.slots)
            first = own.first_loaded(index, turn)
            rows = source.at[layer, own.sequence(index), kv_head, pl.ds(first, plan.positions)]
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(rows, ring.at[slot], arrived.at[slot], oob_mode=in_bounds)

    load_keys = functools.partial(load, source=keys[0], ring=key_ring, arrived=keys_arrived)
    load_values = functools.partial(load, source=values[0], ring=value_ring, arrived=values_arrived)
    for turn in range(plan.slots):
        load_keys(turn + 0 * rank)
        load_values(turn + 0 * rank)

    def reload(turn, load):
        if is_interpreted():
            # The copy waits for the warpgroup's reads, which suffices on the GPU; the race detector needs this.
            plgpu.commit_smem()
        load(turn + plan.slots)

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

        def vector(array, head, tables=None):
            ref, first = array
            return load_vector(plan, ref.at[sequence, first + head], tables)

        # Beyond the group the last member repeats the group's last query.
        heads = [
            kv_head * plan.group + jnp.minimum(member * plan.queries + i, plan.group - 1) for i in range(plan.queries)
        ]
        own_tables = None if tables is None else [table.at[sequence] for table in tables]
        rotated = [vector(q, head, own_tables) for head in heads]
        queries = [tuple(half * plan.score_unit for half in query) for query in rotated]
        slope = [None if slopes is None else slopes[head] * math.log2(math.e) for head in heads]

        def new_token() -> tuple[CachedVector, CachedVector]:
            return as_cached(plan, vector(k, kv_head, own_tables)), as_cached(plan, vector(v, kv_head))

        key, value = (cached.numbers() for cached in new_token())
        joins = length < plan.capacity
        scores = [jnp.sum(query[0] * key[0] + query[1] * key[1], axis=0) for query in queries]
        if slopes is not None:
            scores = [score + length.astype(jnp.float32) * each for score, each in zip(scores, slope, strict=True)]
        scores = [jnp.where(joins, score, MASKED_SCORE) for score in scores]
        counts = joins & (rank == 0)  # whether the new token is among this block's positions

        def by_tiles():
            """The sums by `tiles`; the new token is a total of its own."""
            share = jnp.where(counts, 1.0, 0.0)
            for i, score in enumerate(scores):
                for half in range(2):
                    elements = slice(half * plan.half, (half + 1) * plan.half)
                    query_rows[i, elements] = rotated[i][half].astype(query_rows.dtype)
                    totals[WARPS, i, elements] = value[half] * share
                terms[WARPS, i, 0] = score
                terms[WARPS, i, 1] = share
            synchronize()
            rows = load_queries(plan, query_rows)

            def step(turn, sums):
                slot, first, own_slopes = (
                    lax.rem(turn, plan.slots),
                    first_loaded(turn),
                    None if slopes is None else slope,
                )
                plgpu.barrier_wait(keys_arrived.at[slot])
                counted = first_position(turn), seen
                sums, weights = score_tile(plan, sums, rows, key_ring.at[slot], first, counted, own_slopes)
                reload(turn, load_keys)
                plgpu.barrier_wait(values_arrived.at[slot])
                sums = add_tile(plan, sums, weights, value_ring.at[slot])
                reload(turn, load_values)
                return sums

            store_tile_sums(plan, over_turns(step, start_tile_sums(plan, scores)), totals, terms)

        def by_rows():
            """The sums by `steps`; the new token is in every row."""
            share = jnp.where(counts, 1 / ROWS, 0.0)
            sums = [start_sums(plan, score, value, share) for score in scores]
            query_sums = [None if plan.bits is None else jnp.sum(first + second, axis=0) for first, second in queries]
            wide_queries = [tuple(to_rows(plan, half) for half in query) for query in queries]
            slices = range(0, plan.positions, ROWS)

            def grids(arrays, first):
                if plan.bits is None:
                    return [None for _ in slices]
                scale, zero = (array.at[layer, sequence, kv_head] for array in arrays[1:])
                return [load_grids(plan, scale, zero, first + row) for row in slices]

            def step(turn, sums):
                slot, first = lax.rem(turn, plan.slots), first_loaded(turn)
                key_grids, value_grids = grids(keys, first), grids(values, first)
                plgpu.barrier_wait(keys_arrived.at[slot])
                scores = [[] for _ in heads]
                for row, grid in zip(slices, key_grids, strict=True):
                    rows = load_rows(plan, key_ring.at[slot], row)
                    position = first + row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plan.layout.reduce(1))
                    for i in range(len(heads)):
                        score = products(wide_queries[i], rows)
                        if grid is not None:
                            score = (score - grid[1] * query_sums[i]) * grid[0]
                        if slopes is not None:
                            score = score + position.astype(jnp.float32) * slope[i]
                        counts_here = (position >= first_position(turn)) & (position < seen)
                        scores[i].append(jnp.where(counts_here, score, MASKED_SCORE))
                reload(turn, load_keys)
                rescaled = [rescale(plan, *pair) for pair in zip(sums, scores, strict=True)]
                sums, weights = [pair[0] for pair in rescaled], [pair[1] for pair in rescaled]
                plgpu.barrier_wait(values_arrived.at[slot])
                for j, (row, grid) in enumerate(zip(slices, value_grids, strict=True)):
                    rows = load_rows(plan, value_ring.at[slot], row)
                    pairs = zip(sums, weights, strict=True)
                    sums = [add_values(plan, each, weight[j], rows, grid) for each, weight in pairs]
                reload(turn, load_values)
                return sums

            store_rows(plan, over_turns(step, sums), totals, terms)

        (by_tiles if plan.on_tensor_cores else by_rows)()
        # Loaded here, under the way of the sums through shared memory, and stored when no block loads from the cache.
        entering = new_token()
        synchronize()
        first_head = kv_head * plan.group + member * plan.queries
        queries_of_block = (first_head, rank, jnp.minimum(plan.group - member * plan.queries, plan.queries))
        context, *by_block = (ref.at[sequence] for ref in ([out, sums_out, terms_out] if plan.splits > 1 else [out]))
        store_totals(plan, totals, terms, *(by_block or (context, None)), *queries_of_block)
        if plan.cluster > 1:
            meet_cluster(blocks_done)

        @pl.when(joins & (block == plan.cluster - 1))
        def _():
            at = (layer, sequence, kv_head, length)
            for cached, arrays in zip(entering, (keys, values), strict=True):
                store_vector(plan, cached, arrays, at)

        if plan.splits > 1:
            store_contexts(plan, *by_block, context, *queries_of_block)
        if plan.sequences > 1:
            synchronize()  # the totals have been read

    if plan.sequences == 1:
        attend(jnp.int32(0))
    else:
        pl.loop(0, plan.sequences)(attend)
