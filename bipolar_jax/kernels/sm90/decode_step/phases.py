"""The phases of a layer, as a warpgroup goes through them: what it reads, computes and leaves for other blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.fragments import VECTOR, pinned, repeat
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.attention import join
from bipolar_jax.kernels.sm90.decode_step.attention.attend import attend, load_tables
from bipolar_jax.kernels.sm90.decode_step.config import HEAD_DIM, PARTIAL, PRODUCTS, WARPGROUPS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.polling import written_mark
from bipolar_jax.kernels.sm90.decode_step.products import column_terms, finish, multiply, prefetch_terms, rows_of
from bipolar_jax.kernels.sm90.decode_step.quantize_token import layer_normalized, quantize_token
from bipolar_jax.kernels.sm90.decode_step.vectors import (
    await_parts,
    load_part,
    load_vector,
    prefetch_vector,
    store_vector,
)
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights

PHASES = ("qkv", "attention", "join", "o", "up", "down")
# As `kernels.prologue`'s, of what Mosaic can lower.
_FUNCTIONS = {
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


class Buffers(NamedTuple):
    """What passes between phases: flat float32 arrays in memory, of marked numbers.

    Attributes:
      hidden: what a layer reads.
      attended: what its feed-forward reads.
      qkv: projections of every layer.
      partials: of attention, for every head `splits` of PARTIAL numbers.
      context: the heads' attention.
      ffn: activations between up, and its gate, and down.
    """

    hidden: Any
    attended: Any
    qkv: Any
    partials: Any
    context: Any
    ffn: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayersWeights:
    """Weights of all layers.

    Attributes:
      products: by name, of PRODUCTS.
      norms: by the product that follows, flat gains and, of LayerNorms, biases [layers * hidden].
    """

    products: dict[str, ProductWeights]
    norms: dict[str, tuple[Any, ...]]


def buffers_of(shape: LayersShape) -> Buffers:
    """Shapes of the buffers."""
    sizes = (
        shape.hidden,
        shape.hidden,
        shape.num_layers * shape.products["qkv"].n,
        PARTIAL * shape.heads * shape.splits,
        shape.heads * HEAD_DIM,
        shape.ffn,
    )
    return Buffers(*(jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes))


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the warpgroups of a block share: refs, `meet` to wait for each other, and whether this is interpret mode."""

    products: Any
    exchange: Any
    code_sums: Any
    columns: Any
    x_tiles: Any
    meet: Callable[[], None]
    emulate: bool


class Phases:
    """The phases of a layer, of one warpgroup. What is left in memory for other blocks, the first one leaves."""

    def __init__(self, shape, weights, cache, ring, cache_ring, shared, sources, outs, me, block):
        self._shape, self._weights, self._cache = shape, weights, cache
        self._ring, self._cache_ring, self._shared = ring, cache_ring, shared
        self._sources, self._outs, self._where = sources, outs, (me, block)
        self._pin()

    def _pin(self) -> None:
        self._me, self._block = (pinned(number) for number in self._where)

    def enter(self, hidden) -> None:
        """Copies this block's rows of what the first layer reads to where the next ones find theirs.

        All that other blocks will wait for is cleared of the mark that they wait for.
        """
        shape, outs = self._shape, self._outs
        nothing = plgpu.layout_cast(jnp.zeros(HEAD_DIM, jnp.float32), VECTOR)

        def clear(ref, name: str, start, mark) -> None:
            for chunk in range(shape.products[name].chunks):
                first, count = rows_of(shape.products[name], self._block, chunk)
                store_vector(ref, nothing, start + first, count, mark, emulate=self._shared.emulate)

        def clear_projections(layer) -> None:
            clear(outs.qkv, "qkv", layer * shape.products["qkv"].n, 1 - written_mark(layer))

        @pl.when(self._me == 0)
        def _():
            down = shape.products["down"]
            for chunk in range(down.chunks):
                first, count = rows_of(down, self._block, chunk)
                numbers = self._load(hidden, first, first + count)
                store_vector(outs.hidden, numbers, first, count, 0, emulate=self._shared.emulate)
            repeat(shape.num_layers, clear_projections)
            clear(outs.attended, "o", 0, 0)
            clear(outs.ffn, "up", 0, 0)
            join.clear(shape, self._block, outs.partials, outs.context, emulate=self._shared.emulate)

    def prepare(self, phase: str, layer):
        """What a phase of a layer reads first, of what no other block computes: the norm's vectors, or of attention.

        What the next product will read of that kind is sent for.
        """
        self._pin()
        emulate = self._shared.emulate
        if phase == "attention":
            return load_tables(self._cache, emulate=emulate)
        if phase == "join":
            return None
        following = PRODUCTS[(PRODUCTS.index(phase) + 1) % len(PRODUCTS)]
        self._prefetch(following, jnp.minimum(layer + (following == PRODUCTS[0]), self._shape.num_layers - 1))
        start = layer * self._shape.hidden
        end = start + self._shape.hidden
        return [
            [load_part(vector, start + at, end, emulate=emulate) for at in self._starts(phase)]
            for vector in self._weights.norms.get(phase, ())
        ]

    def _prefetch(self, phase: str, layer) -> None:
        shape, emulate = self._shape, self._shared.emulate

        @pl.when(self._me == 1)
        def _():
            prefetch_terms(shape, self._weights.products[phase], layer, phase, self._block, emulate=emulate)
            if phase in self._weights.norms:

                @pl.when(self._block == 0)  # for all
                def _():
                    for vector in self._weights.norms[phase]:
                        prefetch_vector(vector, layer * shape.hidden, shape.hidden, emulate=emulate)

    def _residual(self, phase: str):
        """What a product is added to, in chunks of 128: this block left it itself."""
        source = {"o": self._sources.hidden, "down": self._sources.attended}.get(phase)
        if source is None:
            return None
        product = self._shape.products[phase]
        rows = [rows_of(product, self._block, chunk) for chunk in range(product.chunks)]
        return [self._load(source, first, first + count) for first, count in rows]

    def run(self, phase: str, index, layer, prepared) -> None:
        """One phase of a layer, which is the index-th that is computed."""
        self._pin()
        shape, shared = self._shape, self._shared
        if phase == "attention":
            start, partials, mark = layer * shape.products["qkv"].n, self._outs.partials, written_mark(layer)
            ring, qkv, where = self._cache_ring, self._sources.qkv, (self._me, self._block)
            attend(shape, self._cache, ring, index, prepared, qkv, start, mark, *where, shared, partials)
            return
        if phase == "join":

            @pl.when(self._me == 0)
            def _():
                partials, context = self._sources.partials, self._outs.context
                join.join(shape, self._block, partials, context, written_mark(layer), emulate=shared.emulate)

            return
        product, parts, squares = shape.products[phase], self._inputs(phase, layer), None
        norm = [[part.astype(jnp.float32) for part in vector] for vector in prepared]
        if norm and shape.norm == "rms":
            squares = [part * part for part in parts]
            parts = [part * gain for part, gain in zip(parts, *norm, strict=True)]
        elif norm:
            parts = layer_normalized(parts, *norm, product.k, shape.norm_eps, self._me, shared)
        grid = quantize_token(parts, squares, product.k, shape.norm_eps, shape.a_format, self._me, shared)
        # Not before: what the quantizer leaves for the tensor cores waits for all loads that are under way.
        weights = self._weights.products[phase]
        terms = column_terms(shape, weights, layer, phase, self._block, emulate=shared.emulate)
        residual = self._residual(phase)
        multiply(shape, self._ring, index, phase, self._me, shared.x_tiles, shared.products, emulate=shared.emulate)
        shared.meet()

        @pl.when(self._me == 0)
        def _():
            for chunk in range(product.chunks):
                halves = [finish(shape, phase, terms[i][chunk], shared, grid, i, chunk) for i in range(product.halves)]
                if residual is not None:
                    halves = [halves[0] + residual[chunk]]
                self._leave(phase, layer, halves, *rows_of(product, self._block, chunk))

    def _inputs(self, phase: str, layer):
        """The parts of the token that this warpgroup multiplies, once they are there."""
        sources, product = self._sources, self._shape.products[phase]
        source = {"qkv": sources.hidden, "o": sources.context, "up": sources.attended, "down": sources.ffn}[phase]
        mark = written_mark(layer - 1 if phase == "qkv" else layer)
        needed = rows_of(product, self._block, 0)[1] > 0
        return await_parts(source, self._starts(phase), product.k, mark, needed, emulate=self._shared.emulate)

    def _leave(self, phase: str, layer, halves, first, count) -> None:
        """Stores what a product gives."""
        outs, numbers = self._outs, halves[0]
        if phase == "qkv":
            first += layer * self._shape.products["qkv"].n
        elif phase == "up":
            numbers = _FUNCTIONS[self._shape.activation.function](numbers)
            numbers = (numbers * halves[1] if len(halves) == 2 else numbers) + 0.0  # a mark would make -0 negative
        target = {"qkv": outs.qkv, "o": outs.attended, "up": outs.ffn, "down": outs.hidden}[phase]
        store_vector(target, numbers, first, count, written_mark(layer), emulate=self._shared.emulate)

    def _starts(self, phase: str):
        """Where in K the parts begin that this warpgroup multiplies."""
        return [(self._me + turn * WARPGROUPS) * K_SLICE for turn in range(self._shape.products[phase].turns)]

    def _load(self, ref, start, end):
        return load_vector(ref, start, end, emulate=self._shared.emulate)
