"""All layers of a decoder for one new token, in one kernel.

Persistent blocks, one a multiprocessor, go through the layers together and wait for each other six times in each: after
the query, key and value projections, after attention and once it is joined, after the output projection, after gate and
up, and after down. What passes from one to the next is a few vectors in memory, of numbers that say themselves that
they have come (`marks`). Every block makes the whole token's operand for itself, the norm and the quantization
included, since that is quicker than to wait for another. Weights and the cache depend on nothing that is computed: they
are on their way to shared memory while blocks compute, and wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.core import wgmma
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.core.wgmma import WORDS_PER_ROW
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import Cache, CacheRing, copies_of_chunk, slots_of_cache
from bipolar_jax.kernels.sm90.decode_step.config import HEAD_DIM, PRODUCTS, TILE, WARPGROUPS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.phases import PHASES, Buffers, LayersWeights, Phases, Shared, buffers_of
from bipolar_jax.kernels.sm90.decode_step.polling import with_mark
from bipolar_jax.kernels.sm90.decode_step.weight_ring import WeightRing

# Of a thread. A block of 5 warpgroups starts with 96 each, the most that 65536 allow, and shares out no others.
_LOADING_REGISTERS, _COMPUTING_REGISTERS = 24, 112


def run_layers(
    hidden: Float[Array, " hidden"],
    weights: LayersWeights,
    cache: Cache,
    shape: LayersShape,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, " hidden"], Float[Array, "layers qkv"]]:
    """The hidden state after all layers, and their projections.

    Args:
      hidden: of the new token, float32.
      weights: arrays.
      cache: arrays; the new token's keys and values are not in it, and are not written.
      shape: static.
      interpret: parameters of interpret mode, for tests on a CPU. It knows no blocks that wait for each other: every
        phase of every layer is a kernel then.

    Returns:
      [hidden] float32; and queries, keys and values of the token before they are rotated.
    """
    run = functools.partial(_launch, shape, weights, cache, interpret=interpret)
    if interpret is None:
        buffers = run(hidden, None, range(shape.num_layers), PHASES)
    else:
        buffers = Buffers(with_mark(hidden, 0), *(jnp.zeros(b.shape, b.dtype) for b in buffers_of(shape)[1:]))
        for layer in range(shape.num_layers):
            for phase in PHASES:
                buffers = _merged(shape, layer, phase, buffers, run(hidden, buffers, range(layer, layer + 1), (phase,)))
    return buffers.hidden, buffers.qkv.reshape(shape.num_layers, -1)


def _merged(shape: LayersShape, layer: int, phase: str, before: Buffers, after: Buffers) -> Buffers:
    """The buffers after a phase that was a kernel of its own: it wrote one of them, or its layer's part."""
    written = dict(zip(PHASES, ("qkv", "partials", "context", "attended", "ffn", "hidden"), strict=True))[phase]
    new = getattr(after, written)
    if written == "qkv":
        mine = jnp.arange(new.size) // shape.products["qkv"].n == layer
        new = jnp.where(mine, new, before.qkv)
    return before._replace(**{written: new})


def _launch(
    shape: LayersShape,
    weights: LayersWeights,
    cache: Cache,
    hidden,
    sources: Buffers | None,
    layers: range,
    phases: Sequence[str],
    interpret,
) -> Buffers:
    """Runs phases of layers; without `sources` they read what they write."""
    operands = (hidden, weights, cache, sources)
    flat, tree = jax.tree.flatten(operands)
    word_tiles = functools.partial(plgpu.SMEM, dtype=jnp.uint32, transforms=wgmma.TILE_TRANSFORMS)
    outs = launch_kernel(
        functools.partial(_kernel, shape, layers, tuple(phases), tree, interpret is not None),
        out_type=list(buffers_of(shape)),
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            w_slots=word_tiles((WARPGROUPS * shape.w_slots + 1, TILE, WORDS_PER_ROW)),
            w_arrived=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=shape.w_slots),
            w_emptied=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=shape.w_slots),
            x_tiles=word_tiles((WARPGROUPS, shape.most_turns, 8, WORDS_PER_ROW)),
            cache_slots=slots_of_cache(shape, cache.keys.dtype),
            cache_arrived=plgpu.Barrier(num_arrivals=copies_of_chunk(shape), num_barriers=2 * WARPGROUPS),
            products=plgpu.SMEM((WARPGROUPS, shape.most_rows), jnp.int32),
            exchange=plgpu.SMEM((8, WARPGROUPS * WARPS), jnp.float32),
            code_sums=plgpu.SMEM((WARPGROUPS * WARPS,), jnp.int32),
            columns=plgpu.SMEM((WARPGROUPS * WARPS, HEAD_DIM), jnp.float32),
            met=plgpu.Barrier(num_arrivals=WARPGROUPS),
            released=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="decode_layers",
        interpret=interpret,
    )(*flat)
    return Buffers(*outs)


def _kernel(shape, layers, phases, tree, emulate, *refs, w_slots, w_arrived, w_emptied, **shared):
    operands, outs = refs[: tree.num_leaves], Buffers(*refs[tree.num_leaves :])
    hidden, weights, cache, sources = jax.tree.unflatten(tree, operands)
    me, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    ring = WeightRing(shape, [name for name in PRODUCTS if name in phases], w_slots, w_arrived, w_emptied)

    @pl.when(me == WARPGROUPS)
    def _():
        plgpu.set_max_registers(_LOADING_REGISTERS, action="decrease")
        ring.fill(weights.products, layers, block, emulate=emulate)

    @pl.when(me < WARPGROUPS)
    def _():
        plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
        where = (me, block)
        _compute(shape, layers, phases, ring, weights, cache, hidden, sources or outs, outs, where, emulate, **shared)


def _compute(
    shape,
    layers,
    phases,
    ring,
    weights,
    cache,
    hidden,
    sources,
    outs,
    where,
    emulate,
    *,
    cache_slots,
    cache_arrived,
    met,
    released,
    **shared_refs,
):
    """What the warpgroups do that do not load weights."""
    me, block = where

    def meet():
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

    shared = Shared(meet=meet, emulate=emulate, **shared_refs)
    cache_ring = None
    if "attention" in phases:
        cache_ring = CacheRing(shape, cache, layers, me, block, cache_slots, cache_arrived)
    steps = Phases(shape, weights, cache, ring, cache_ring, shared, sources, outs, me, block)
    if emulate:
        index = 0 * me
        steps.run(phases[0], index, layers[0], steps.prepare(phases[0], layers[0]))
        return

    def release():
        @pl.when(me == 0)
        def _():
            plgpu.barrier_arrive(released)

    steps.enter(hidden)
    _meet_blocks(shape.blocks, me, meet)

    def layer(index, carry):
        for phase in phases:
            prepared = steps.prepare(phase, index)
            # While the first warpgroup finishes a phase the others must not keep memory busy by looking for what
            # comes next; it alone joins what it has left.
            if phase != "join":
                plgpu.barrier_wait(released)
            steps.run(phase, index, index, prepared)
            if phase != "attention":
                release()
        return carry

    release()
    lax.fori_loop(0, len(layers), layer, ())


def _meet_blocks(blocks: int, me, meet) -> None:
    """Waits for all blocks, and for what their first warpgroups wrote."""
    blocks_met = pl.get_global(plgpu.SemaphoreType.REGULAR)

    @pl.when(me == 0)
    def _():
        plgpu.semaphore_signal(blocks_met, 1, memory_scope="gpu")
        plgpu.semaphore_wait(blocks_met, blocks, decrement=False, memory_scope="gpu")

    meet()
