"""All layers of a decoder for one new token, in one kernel.

Persistent blocks, one a multiprocessor, go through the layers together and meet five times in each: after the
query, key and value projections, after attention, after the output projection, after gate and up, and after down.
What passes from one to the next is a few vectors in memory. Every block makes the whole token's operand for itself, the
norm and the quantization included, since that is quicker than to wait for another. Weights and the cache depend on
nothing that is computed: they are on their way to shared memory while blocks compute, and wait for each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90 import tensor_core
from bipolar_jax.kernels.sm90.decode_layers.attention import HALF, Cache, CacheRing, attend
from bipolar_jax.kernels.sm90.decode_layers.products import (
    ProductWeights,
    WeightRing,
    column_terms,
    finish,
    multiply,
    rows_of,
)
from bipolar_jax.kernels.sm90.decode_layers.shape import (
    HEAD_DIM,
    PART,
    PARTIAL,
    POSITIONS,
    PRODUCTS,
    TILE,
    WARPGROUPS,
    LayersShape,
)
from bipolar_jax.kernels.sm90.decode_layers.threads import (
    WARPS,
    load_attended,
    load_part,
    load_vector,
    pinned,
    store_vector,
)
from bipolar_jax.kernels.sm90.decode_layers.token import quantize_token
from bipolar_jax.kernels.sm90.tensor_core import WORDS_PER_ROW

PHASES = ("qkv", "attention", "o", "gate_up", "down")


class Buffers(NamedTuple):
    """What passes between phases: flat float32 arrays in memory.

    Attributes:
      hidden: what a layer reads.
      attended: what its feed-forward reads.
      qkv: projections of every layer.
      partials: of attention, for every head `records` of PARTIAL numbers.
      ffn: activations between gate and up, and down.
    """

    hidden: Any
    attended: Any
    qkv: Any
    partials: Any
    ffn: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayersWeights:
    """Weights of all layers.

    Attributes:
      products: by name, of PRODUCTS.
      attention_gain, ffn_gain: of the RMSNorms, flat [layers * hidden].
    """

    products: dict[str, ProductWeights]
    attention_gain: Any
    ffn_gain: Any


def buffers_of(shape: LayersShape) -> Buffers:
    """Shapes of the buffers."""
    sizes = (
        shape.hidden,
        shape.hidden,
        shape.num_layers * shape.products["qkv"].n,
        PARTIAL * shape.heads * shape.records,
        shape.ffn,
    )
    return Buffers(*(jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes))


def decode_layers(
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
        buffers = Buffers(hidden, *(jnp.zeros(b.shape, b.dtype) for b in buffers_of(shape)[1:]))
        for layer in range(shape.num_layers):
            for phase in PHASES:
                buffers = _merged(shape, layer, phase, buffers, run(hidden, buffers, range(layer, layer + 1), (phase,)))
    return buffers.hidden, buffers.qkv.reshape(shape.num_layers, -1)


def _merged(shape: LayersShape, layer: int, phase: str, before: Buffers, after: Buffers) -> Buffers:
    """The buffers after a phase that was a kernel of its own: it wrote one of them, or its layer's part."""
    written = dict(zip(PHASES, ("qkv", "partials", "attended", "ffn", "hidden"), strict=True))[phase]
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
    word_tiles = functools.partial(plgpu.SMEM, dtype=jnp.uint32, transforms=tensor_core.TILE_TRANSFORMS)
    slots = WARPGROUPS * shape.w_slots
    outs = plgpu.kernel(
        functools.partial(_kernel, shape, layers, tuple(phases), tree, interpret is not None),
        out_type=list(buffers_of(shape)),
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=dict(
            w_ring=word_tiles((slots + 1, TILE, WORDS_PER_ROW)),
            w_arrived=plgpu.Barrier(num_barriers=slots),
            x_tiles=word_tiles((WARPGROUPS, shape.most_turns, 8, WORDS_PER_ROW)),
            cache_slots=plgpu.SMEM(
                (shape.cache_slots, WARPGROUPS, 2, POSITIONS, HALF),
                cache.keys.dtype,
                transforms=(plgpu.SwizzleTransform(128),),
            ),
            cache_arrived=plgpu.Barrier(num_arrivals=2, num_barriers=2 * WARPGROUPS),
            products=plgpu.SMEM((WARPGROUPS, shape.most_rows), jnp.int32),
            exchange=plgpu.SMEM((3, WARPGROUPS * WARPS), jnp.float32),
            code_sums=plgpu.SMEM((WARPGROUPS * WARPS,), jnp.int32),
            columns=plgpu.SMEM((WARPGROUPS * WARPS, HEAD_DIM), jnp.float32),
            met=plgpu.Barrier(num_arrivals=WARPGROUPS),
            released=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*flat)
    return Buffers(*outs)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What the warpgroups of a block share: refs, `meet` to wait for each other, and whether this is interpret mode."""

    products: Any
    exchange: Any
    code_sums: Any
    columns: Any
    x_tiles: Any
    meet: Callable[[], None]
    emulate: bool


def _kernel(
    shape,
    layers,
    phases,
    tree,
    emulate,
    *refs,
    w_ring,
    w_arrived,
    cache_slots,
    cache_arrived,
    met,
    released,
    **shared_refs,
):
    operands, outs = refs[: tree.num_leaves], Buffers(*refs[tree.num_leaves :])
    hidden, weights, cache, sources = jax.tree.unflatten(tree, operands)
    me, block = lax.axis_index("warpgroup"), lax.axis_index("block")

    def meet():
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

    shared = _Shared(meet=meet, emulate=emulate, **shared_refs)
    ring = None
    if names := [name for name in PRODUCTS if name in phases]:
        ring = WeightRing(shape, weights.products, names, layers, me, block, w_ring, w_arrived)
    cache_ring = None
    if "attention" in phases:
        cache_ring = CacheRing(shape, cache, layers, me, block, cache_slots, cache_arrived)
    steps = _Phases(shape, weights, cache, ring, cache_ring, shared, sources or outs, outs, me, block)
    if emulate:
        index = 0 * me
        steps.run(phases[0], index, layers[0], steps.prepare(phases[0], layers[0]))
        return
    blocks_met = pl.get_global(plgpu.SemaphoreType.REGULAR)

    def meet_blocks(times, prepare):
        """Waits for all blocks, and for what they wrote, which the first warpgroups did; prepares what comes next."""

        @pl.when(me == 0)
        def _():
            plgpu.semaphore_signal(blocks_met, 1, memory_scope="gpu")

        prepared = prepare()

        @pl.when(me == 0)
        def _():
            plgpu.semaphore_wait(blocks_met, (times + 1) * shape.blocks, decrement=False, memory_scope="gpu")
            plgpu.barrier_arrive(released)

        plgpu.barrier_wait(released)
        return prepared

    steps.enter(hidden)
    first = functools.partial(steps.prepare, phases[0])
    prepared = meet_blocks(0 * me, lambda: first(0 * me))

    def layer(index, prepared):
        for number, phase in enumerate(phases):
            steps.run(phase, index, index, prepared)
            last = number + 1 == len(phases)
            prepared = meet_blocks(
                1 + index * len(phases) + number,
                (lambda: first(jnp.minimum(index + 1, len(layers) - 1)))
                if last
                else functools.partial(steps.prepare, phases[number + 1], index),
            )
        return prepared

    lax.fori_loop(0, len(layers), layer, prepared)


class _Phases:
    """The five phases of a layer, of one warpgroup. What is left in memory for other blocks, the first one leaves."""

    def __init__(self, shape, weights, cache, ring, cache_ring, shared, sources, outs, me, block):
        self._shape, self._weights, self._cache = shape, weights, cache
        self._ring, self._cache_ring, self._shared = ring, cache_ring, shared
        self._sources, self._outs, self._where = sources, outs, (me, block)
        self._pin()

    def _pin(self) -> None:
        self._me, self._block = (pinned(number, emulate=self._shared.emulate) for number in self._where)

    def enter(self, hidden) -> None:
        """Copies this block's rows of what the first layer reads to where the next ones find theirs."""
        product = self._shape.products["down"]

        @pl.when(self._me == 0)
        def _():
            for chunk in range(product.chunks):
                first, count = rows_of(product, self._block, chunk)
                self._store(self._outs.hidden, self._load(hidden, first, first + count), first, count)

    def prepare(self, phase: str, layer):
        """What a phase of a layer reads that no other block computes.

        Terms of columns; what the product is added to, which this block left itself; the norm's gain.
        """
        self._pin()
        if phase == "attention":
            return ()
        weights = self._weights.products[phase]
        emulate = self._shared.emulate
        terms = column_terms(self._shape, weights, layer, phase, self._block, emulate=emulate)
        gain = {"qkv": self._weights.attention_gain, "gate_up": self._weights.ffn_gain}.get(phase)
        if gain is None:
            product = self._shape.products[phase]
            source = {"o": self._sources.hidden, "down": self._sources.attended}[phase]
            rows = [rows_of(product, self._block, chunk) for chunk in range(product.chunks)]
            return terms, [self._load(source, first, first + count) for first, count in rows], None
        start, hidden = layer * self._shape.hidden, self._shape.hidden
        return terms, None, [self._load_part(gain, start + at, start + hidden) for at in self._starts(phase)]

    def run(self, phase: str, index, layer, prepared) -> None:
        """One phase of a layer, which is the index-th that is computed."""
        self._pin()
        shape, shared = self._shape, self._shared
        if phase == "attention":
            start, partials = layer * shape.products["qkv"].n, self._outs.partials
            ring, qkv = self._cache_ring, self._sources.qkv
            attend(shape, self._cache, ring, index, qkv, start, self._me, self._block, shared, partials)
            return
        product, (terms, residual, gains) = shape.products[phase], prepared
        parts, squares = self._inputs(phase), None
        if gains is not None:
            squares = [part * part for part in parts]
            parts = [part * gain for part, gain in zip(parts, gains, strict=True)]
        grid = quantize_token(parts, squares, product.k, shape.norm_eps, shape.a_format, self._me, shared)
        multiply(shape, self._ring, index, phase, self._me, shared.x_tiles, shared.products, emulate=shared.emulate)
        shared.meet()

        @pl.when(self._me == 0)
        def _():
            for chunk in range(product.chunks):
                halves = [finish(shape, phase, terms[i][chunk], shared, grid, i, chunk) for i in range(product.halves)]
                if residual is not None:
                    halves = [halves[0] + residual[chunk]]
                self._leave(phase, layer, halves, *rows_of(product, self._block, chunk))

    def _inputs(self, phase: str):
        """The parts of the token that this warpgroup multiplies."""
        shape, sources, starts = self._shape, self._sources, self._starts(phase)
        if phase == "o":
            return [
                load_attended(
                    sources.partials, start, shape.heads, shape.records, PARTIAL, emulate=self._shared.emulate
                )
                for start in starts
            ]
        source = {"qkv": sources.hidden, "gate_up": sources.attended, "down": sources.ffn}[phase]
        return [self._load_part(source, start, shape.products[phase].k) for start in starts]

    def _leave(self, phase: str, layer, halves, first, count) -> None:
        """Stores what a product gives."""
        outs, numbers = self._outs, halves[0]
        if phase == "qkv":
            self._store(outs.qkv, numbers, layer * self._shape.products["qkv"].n + first, count)
        elif phase == "gate_up":
            self._store(outs.ffn, numbers / (1.0 + jnp.exp(-numbers)) * halves[1], first, count)
        else:
            self._store({"o": outs.attended, "down": outs.hidden}[phase], numbers, first, count)

    def _starts(self, phase: str):
        """Where in K the parts begin that this warpgroup multiplies."""
        return [(self._me + turn * WARPGROUPS) * PART for turn in range(self._shape.products[phase].turns)]

    def _load(self, ref, start, end):
        return load_vector(ref, start, end, emulate=self._shared.emulate)

    def _load_part(self, ref, start, end):
        return load_part(ref, start, end, emulate=self._shared.emulate)

    def _store(self, ref, values, start, count):
        store_vector(ref, values, start, count, emulate=self._shared.emulate)
