"""All layers of a decoder for one new token of each of a few texts, as one persistent kernel.

One block a multiprocessor; all blocks go through the layers together. They wait for each other six times in each: after
the projections of queries, keys and values, after attention, after its combination, after the output projection, after
gate and up, and after down. Only a few vectors pass from one phase to the next, in global memory and self-flagging
(`cooperative.polling`). Every block normalizes and quantizes the token itself, which is quicker than waiting for
another block to do it; the tokens of several texts are divided between two blocks (`cooperative.teams`). Weights and
the cache depend on nothing that is computed: they keep arriving in shared memory while blocks compute and while they
wait.
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

from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.cluster import open_mailbox
from bipolar_jax.kernels.sm90.core.emulation import is_interpreted, launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.sync import meet_cluster
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import (
    Cache,
    CacheRing,
    cache_slot_types,
    copies_of_chunk,
)
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import (
    PAIR,
    PRODUCTS,
    WARPGROUPS,
    Layers,
    LayersShape,
)
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import in_phase
from bipolar_jax.kernels.sm90.decode_step.cooperative.reductions import BLOCK_WARPS
from bipolar_jax.kernels.sm90.decode_step.cooperative.teams import mailbox_of, token_sums_shape
from bipolar_jax.kernels.sm90.decode_step.cooperative.timeline import Timeline, timeline_type
from bipolar_jax.kernels.sm90.decode_step.phases import (
    PHASES,
    WRITTEN,
    Buffers,
    LayersWeights,
    Phases,
    SharedMemory,
    buffers_of,
)
from bipolar_jax.kernels.sm90.decode_step.products import weight_kind
from bipolar_jax.kernels.sm90.decode_step.weight_ring import WeightRing

# Registers a thread. A block of 5 warpgroups starts with 96 each, the most that 65536 allow; setmaxnreg moves them from
# the producer to the consumers.
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 24, 112


def run_layers(
    hidden: Float[Array, "texts hidden"],
    weights: LayersWeights,
    cache: Cache,
    shape: LayersShape,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, ...]:
    """The hidden states after all layers, and the projections of every layer.

    Args:
      hidden: of the new tokens, float32.
      weights: arrays.
      cache: arrays; the new tokens' keys and values are not in it, and are not written.
      shape: static.
      interpret: parameters of interpret mode, for tests on a CPU. Interpret mode runs blocks one after the other, so
        they cannot wait for each other: every phase is a kernel there, in a loop over layers.

    Returns:
      [texts, hidden] float32; and queries, keys and values of the tokens before rotation, [layers, texts, qkv]. If
      they are timed, also readings of the clock (`timeline.split_timeline`).

    Raises:
      ValueError: interpret mode has no clock.
    """
    hidden, times = hidden.reshape(-1), []
    if interpret is None:
        buffers, times = _launch(shape, weights, cache, hidden, None, None, PHASES, None)
    elif shape.timed:
        raise ValueError("interpret mode has no clock: timed=True needs a device")
    else:

        def layer(index, buffers):
            index = index.astype(jnp.int32)
            for phase in PHASES:
                operands = (weights, cache, hidden, buffers, jnp.reshape(index, (1,)))
                after, _ = _launch(shape, *operands, (phase,), interpret)
                buffers = _with_written(shape, index, phase, buffers, after)
            return buffers

        empty = Buffers(in_phase(hidden, 0), *(jnp.zeros(b.shape, b.dtype) for b in buffers_of(shape)[1:]))
        buffers = lax.fori_loop(0, shape.num_layers, layer, empty)
    qkv = buffers.qkv.reshape(shape.texts, shape.num_layers, -1)
    return buffers.hidden.reshape(shape.texts, -1), qkv.swapaxes(0, 1), *times


def _with_written(shape: LayersShape, layer, phase: str, before: Buffers, after: Buffers) -> Buffers:
    """The buffers after a phase that was a kernel of its own: it wrote one of them, of "qkv" its layer's values."""
    name = WRITTEN[phase]
    new = getattr(after, name)
    if name == "qkv":
        of_layer = jnp.arange(new.size, dtype=jnp.int32) // shape.products["qkv"].n % shape.num_layers == layer
        new = jnp.where(of_layer, new, before.qkv)
    return before._replace(**{name: new})


def _launch(
    shape: LayersShape,
    weights: LayersWeights,
    cache: Cache,
    hidden,
    sources: Buffers | None,
    layer,
    phases: Sequence[str],
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Buffers, list[Array]]:
    """Runs phases of all layers; or, if `layer` is given as int32 [1], of that one.

    Phases read `sources`, or without these the buffers that they write. Also returns readings of the clock, if any.
    """
    operands = (hidden, weights, cache, sources, layer)
    flat, tree = jax.tree.flatten(operands)
    kind, times = weight_kind(shape), [timeline_type(shape, len(phases))] if shape.timed else []
    outs = launch_kernel(
        functools.partial(_kernel, shape, tuple(phases), tree),
        out_type=[*buffers_of(shape), *times],
        **(_pairs(shape) if interpret is None else _blocks(shape)),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            w_slots=kind.slot_types,
            w_arrived=plgpu.Barrier(num_arrivals=kind.copies, num_barriers=shape.w_slots),
            w_emptied=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=shape.w_slots),
            x_operand=kind.operand_type,
            cache_slots=cache_slot_types(shape, cache.keys.dtype),
            cache_arrived=plgpu.Barrier(num_arrivals=copies_of_chunk(shape), num_barriers=2 * shape.chunks_at_once),
            cache_emptied=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2) if shape.heads_at_once > 1 else None,
            product_sums=kind.sums_type,
            warp_results=plgpu.SMEM((8, BLOCK_WARPS), jnp.float32),
            code_sums=plgpu.SMEM(token_sums_shape(shape), jnp.int32),
            context_sums=plgpu.SMEM((BLOCK_WARPS, WARPGROUP), jnp.float32),
            met=plgpu.Barrier(num_arrivals=WARPGROUPS),
            released=plgpu.Barrier(num_arrivals=WARPGROUPS if shape.every_warpgroup_finishes else 1),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="decode_layers",
        interpret=interpret,
    )(*flat)
    count = len(Buffers._fields)
    return Buffers(*outs[:count]), outs[count:]


def _blocks(shape: LayersShape) -> dict[str, tuple]:
    return {"grid": (shape.blocks,), "grid_names": ("block",)}


def _pairs(shape: LayersShape) -> dict[str, tuple]:
    """The grid: of several texts in clusters of PAIR blocks."""
    if shape.texts == 1:
        return _blocks(shape)
    clusters = {"cluster": (PAIR,), "cluster_names": ("rank",)}
    return {"grid": (shape.blocks // PAIR,), "grid_names": ("pair",)} | clusters


def _block_index(shape: LayersShape):
    if shape.texts == 1 or is_interpreted():
        return lax.axis_index("block")
    return lax.axis_index("pair") * PAIR + lax.axis_index("rank")


def _kernel(shape, phases, tree, *refs, w_slots, w_arrived, w_emptied, **shared):
    operands, outs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    outs, times = Buffers(*outs[: len(Buffers._fields)]), outs[len(Buffers._fields) :]
    hidden, weights, cache, sources, layer = jax.tree.unflatten(tree, operands)
    layers = Layers(0, shape.num_layers) if layer is None else Layers(layer[0], 1)
    warpgroup, block = lax.axis_index("warpgroup"), _block_index(shape)
    computed = [name for name in PRODUCTS if name in phases]
    ring = WeightRing(shape, weight_kind(shape), computed, block, w_slots, w_arrived, w_emptied)

    @when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        ring.fill(weights.products, layers)

    @when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        indices, timeline = (warpgroup, block), Timeline(shape, phases, *times, warpgroup=warpgroup, block=block)
        buffers = (hidden, sources or outs, outs)
        _consume(shape, layers, phases, ring, weights, cache, *buffers, indices, timeline, **shared)

    if shape.texts > 1 and not is_interpreted():
        meet_cluster(None)  # copies to the other block read this one's memory


def _consume(
    shape,
    layers,
    phases,
    ring,
    weights,
    cache,
    hidden,
    sources,
    outs,
    indices,
    timeline,
    *,
    cache_slots,
    cache_arrived,
    cache_emptied,
    met,
    released,
    **shared_refs,
):
    """A consumer warpgroup: all phases of all layers.

    Two barriers order the uses of shared memory within a block. All warpgroups arrive at `met`, at least twice a phase:
    what all of them read (rows of `warp_results`) is written before one meeting, read after it, and overwritten after
    the next. The first warpgroup alone reads after a phase's last meeting: `product_sums`, `code_sums`,
    `context_sums`, and the rows of `warp_results` that attention ends with. It arrives at `released` when it has read
    all of these, and every warpgroup waits for that before it runs the next phase, which overwrites them. Of several
    texts each warpgroup reads the sums of its own, and where each attends for a head of its own it reads that head's
    rows: then all of them arrive. Attention has no meeting there.
    """
    warpgroup, block = indices

    def meet():
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

    shared = SharedMemory(meet=meet, **shared_refs)
    cache_ring = None
    if "attention" in phases:
        cache_ring = CacheRing(shape, cache, layers, warpgroup, block, cache_slots, cache_arrived, cache_emptied)
    steps = Phases(shape, weights, cache, ring, cache_ring, shared, sources, outs, warpgroup, block, timeline)
    if is_interpreted():  # one phase of one layer, whose inputs are complete
        steps.run(phases[0], 0 * warpgroup, layers.first, steps.prepare(phases[0], layers.first))
        return

    def release():
        if shape.every_warpgroup_finishes:
            plgpu.barrier_arrive(released)
            return

        @when(warpgroup == 0)
        def _():
            plgpu.barrier_arrive(released)

    if shape.texts > 1:

        @when(warpgroup == 0)
        def _():
            open_mailbox(mailbox_of(shape, shared.code_sums))

    steps.enter(hidden)
    timeline.enter()
    _meet_blocks(shape, warpgroup, meet)

    def layer(index, carry):
        for phase in phases:
            marks = timeline.of(phase, index)
            prepared = steps.prepare(phase, index)
            marks.mark("prepared")
            # Also keeps the other warpgroups from polling, and loading memory, while the first one finishes a phase.
            # The first one alone combines what it wrote in "attention", so that these two count as one phase.
            if phase != "combine":
                plgpu.barrier_wait(released)
            marks.mark("released")
            steps.run(phase, index, index, prepared)
            if phase != "attention":
                release()
        return carry

    release()
    lax.fori_loop(0, layers.count, layer, ())
    timeline.leave()


def _meet_blocks(shape: LayersShape, warpgroup, meet) -> None:
    """Waits for all blocks, and for what their first warpgroups wrote."""
    blocks_met = pl.get_global(plgpu.SemaphoreType.REGULAR)

    @when(warpgroup == 0)
    def _():
        plgpu.semaphore_signal(blocks_met, 1, memory_scope="gpu")
        plgpu.semaphore_wait(blocks_met, shape.blocks, decrement=False, memory_scope="gpu")

    meet()
