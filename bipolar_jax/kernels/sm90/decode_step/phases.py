"""The phases of a layer, for one consumer warpgroup: what each reads, computes, and writes for other blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.arithmetic import activations
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import is_interpreted
from bipolar_jax.kernels.sm90.core.fragments import VECTOR, WARPS, pinned, repeat
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.decode_step.attention import combine
from bipolar_jax.kernels.sm90.decode_step.attention.attend import attend, load_tables
from bipolar_jax.kernels.sm90.decode_step.attention.head_norms import load_gains
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import PRODUCTS, LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import Awaited, phase_bit
from bipolar_jax.kernels.sm90.decode_step.cooperative.rotations import begin_rotation, end_rotation
from bipolar_jax.kernels.sm90.decode_step.cooperative.teams import (
    Team,
    exchange_tokens,
    load_grid,
    ranks_of,
    rows_of,
    store_grid,
    team_of,
)
from bipolar_jax.kernels.sm90.decode_step.cooperative.timeline import Timeline
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import (
    load_slice,
    load_vector,
    poll_slices,
    prefetch,
    store_vector,
)
from bipolar_jax.kernels.sm90.decode_step.products import (
    chunk_rows,
    column_terms,
    finish,
    first_row,
    prefetch_terms,
    rows_of_layer,
)
from bipolar_jax.kernels.sm90.decode_step.quantize_token import (
    TokenGrid,
    TokenSlices,
    layer_normalized,
    quantize_token,
    round_token,
    slice_starts,
)
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights

PHASES = ("qkv", "attention", "combine", "o", "up", "down")


class Buffers(NamedTuple):
    """Values that pass between phases: flat float32 arrays in global memory, self-flagging (`cooperative.polling`).

    Each has the values of all texts, one text after the other.

    Attributes:
      hidden: input of the layer.
      attended: input of the feed-forward block.
      qkv: projections of every layer.
      partials: partial attentions, `splits` of `partial_size` for every head.
      context: output of attention, by text and head.
      ffn: activations, input of the down projection.
    """

    hidden: Any
    attended: Any
    qkv: Any
    partials: Any
    context: Any
    ffn: Any


# The buffer that each phase writes.
WRITTEN = dict(zip(PHASES, ("qkv", "partials", "context", "attended", "ffn", "hidden"), strict=True))
# The buffer that each product multiplies, and the one that it is added to.
_INPUTS = {"qkv": "hidden", "o": "context", "up": "attended", "down": "ffn"}
_RESIDUALS = {"o": "hidden", "down": "attended"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayersWeights:
    """Weights of all layers.

    Attributes:
      products: by name, of PRODUCTS.
      norms: by the name of the product that follows: flat gains and, for LayerNorm, biases, [layers * hidden]; and by
        those of HEAD_NORMS flat gains [layers * head_dim], if heads are normalized.
    """

    products: dict[str, ProductWeights]
    norms: dict[str, tuple[Any, ...]]


def buffers_of(shape: LayersShape) -> Buffers:
    """Shapes of the buffers."""
    sizes = (
        shape.hidden,
        shape.hidden,
        shape.num_layers * shape.products["qkv"].n,
        shape.partial_size * shape.heads * shape.splits,
        shape.heads * shape.head_dim,
        shape.ffn,
    )
    return Buffers(*(jax.ShapeDtypeStruct((shape.texts * size,), jnp.float32) for size in sizes))


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """Shared memory through which the consumer warpgroups of a block pass values, and their barrier.

    Attributes:
      product_sums: of a product, as the ring's `WeightKind` says.
      warp_results: float32 [8 or more, warps]: rows for `reductions`.
      code_sums: of the tokens, int32 of `teams.token_sums_shape`.
      context_sums: of attention, float32 [warps, 128]; of shorter heads the rest of a row is not used.
      x_operand: the token, as the ring's `WeightKind` stores it.
      meet: waits for all consumer warpgroups of the block.
    """

    product_sums: Any
    warp_results: Any
    code_sums: Any
    context_sums: Any
    x_operand: Any
    meet: Callable[[], None]


class Phases:
    """The phases of a layer, for one warpgroup.

    Of one text only the first warpgroup writes to global memory; of several each writes what belongs to one text.
    """

    def __init__(self, shape, weights, cache, ring, cache_ring, shared, sources, outs, warpgroup, block, timeline):
        self._shape, self._weights, self._cache = shape, weights, cache
        self._ring, self._cache_ring, self._shared = ring, cache_ring, shared
        self._sources, self._outs, self._indices, self._timeline = sources, outs, (warpgroup, block), timeline
        self._pin()

    def _pin(self) -> None:
        self._warpgroup, self._block = (pinned(index) for index in self._indices)

    def enter(self, hidden) -> None:
        """Copies this block's rows of the first layer's input to `Buffers.hidden`.

        All other values that blocks will poll for get the opposite phase bit: the buffers are not initialized.
        """
        shape, outs = self._shape, self._outs
        zeros = plgpu.layout_cast(jnp.zeros(WARPGROUP, jnp.float32), VECTOR)

        def clear(ref, name: str, start, phase) -> None:
            product = shape.products[name]
            for chunk in range(product.chunks):
                first, count = chunk_rows(product, self._block, chunk)
                store_vector(ref, zeros, start + first, count, phase, product.by_parts)

        def enter_text(text) -> None:
            qkv, down = shape.products["qkv"], shape.products["down"]
            of_text = outs.qkv if shape.texts == 1 else self._of_text(outs.qkv, text)

            def clear_projections(layer) -> None:
                clear(rows_of_layer(qkv, of_text, layer), "qkv", first_row(qkv, layer), 1 - phase_bit(layer))

            for chunk in range(down.chunks):
                first, count = chunk_rows(down, self._block, chunk)
                values = load_vector(self._of_text(hidden, text), first, first + count, down.by_parts)
                store_vector(self._of_text(outs.hidden, text), values, first, count, 0, down.by_parts)
            repeat(shape.num_layers, clear_projections)
            clear(self._of_text(outs.attended, text), "o", 0, 0)
            clear(self._of_text(outs.ffn, text), "up", 0, 0)

        self._ring.kind.clear_sums(self._shared.product_sums, self._warpgroup)

        @when(self._warpgroup == 0)
        def _():
            if shape.texts == 1:
                enter_text(0)
            else:
                repeat(shape.texts, enter_text)
            combine.clear(shape, self._block, outs.partials, outs.context)

    def prepare(self, phase: str, layer) -> Any:
        """Loads the phase's static inputs (norm weights, RoPE tables), and prefetches the next product's terms."""
        self._pin()
        if phase == "attention":
            gains = load_gains(self._shape, self._weights.norms, layer)
            return load_tables(self._cache, self._cache_ring.text), gains
        if phase == "combine":
            return None
        if phase == "qkv" and self._shape.texts > 1 and not is_interpreted():
            self._cache_ring.prefetch(layer, self._warpgroup, self._block)
        following = PRODUCTS[(PRODUCTS.index(phase) + 1) % len(PRODUCTS)]
        self._prefetch(following, jnp.minimum(layer + int(following == PRODUCTS[0]), self._shape.num_layers - 1))
        start = layer * self._shape.hidden
        end = start + self._shape.hidden
        return [
            [load_slice(vector, start + first, end) for first in self._slice_starts(phase)]
            for vector in self._weights.norms.get(phase, ())
        ]

    def _prefetch(self, phase: str, layer) -> None:
        shape = self._shape

        @when(self._warpgroup == 1)
        def _():
            prefetch_terms(shape, self._weights.products[phase], layer, phase, self._block)
            if phase in self._weights.norms:

                @when(self._block == 0)  # for all blocks
                def _():
                    for vector in self._weights.norms[phase]:
                        prefetch(vector, layer * shape.hidden, shape.hidden)

    def run(self, phase: str, index, layer, prepared) -> None:
        """Runs one phase of a layer, which is the index-th that the launch computes."""
        self._pin()
        if phase == "attention":
            self._attend(index, layer, prepared)
        elif phase == "combine":

            @when(self._warpgroup == 0)
            def _():
                partials, context = self._sources.partials, self._outs.context
                combine.combine(self._shape, self._block, partials, context, phase_bit(layer))
                self._timeline.of(phase, index).mark("stored")

        else:
            self._multiply(phase, index, layer, prepared)

    def _attend(self, index, layer, prepared) -> None:
        ring, qkv, indices = self._cache_ring, self._sources.qkv, (self._warpgroup, self._block)
        qkv_start, partials, phase = layer * self._shape.products["qkv"].n, self._outs.partials, phase_bit(layer)
        qkv_start += ring.text * (qkv.shape[0] // self._shape.texts)
        shared, timeline = self._shared, self._timeline.of("attention", index)
        attend(
            self._shape,
            self._cache,
            ring,
            index,
            *prepared,
            qkv,
            qkv_start,
            phase,
            *indices,
            shared,
            partials,
            timeline,
        )

    def _multiply(self, name: str, index, layer, norm) -> None:
        """A product: norm, quantization, sums, and the rest by the first warpgroup, or one a text."""
        shape, shared, kind = self._shape, self._shared, self._ring.kind
        product, timeline = shape.products[name], self._timeline.of(name, index)
        norm = [[values.astype(jnp.float32) for values in vector] for vector in norm]
        text = 0 if shape.texts == 1 else jnp.minimum(self._warpgroup, shape.texts - 1)
        grid = self._read_tokens(name, index, layer, norm, timeline)
        timeline.mark("encoded")
        # Loaded after the quantizer, whose commit_smem waits for all loads in flight.
        weights = self._weights.products[name]
        terms = column_terms(shape, weights, layer, name, self._block)
        residual = self._residual(name, text)
        ring = dataclasses.replace(self._ring, timeline=timeline)
        kind.multiply(ring, index, name, self._warpgroup, shared.x_operand, shared.product_sums)
        timeline.mark("multiplied")
        shared.meet()
        timeline.mark("met")

        @when(self._warpgroup < shape.texts)
        def _():
            own_grid = grid if shape.texts == 1 else TokenGrid(*load_grid(shared.code_sums, text))
            for chunk in range(product.chunks):
                halves = [
                    finish(shape, kind, name, terms[half][chunk], shared, own_grid, half, chunk, text)
                    for half in range(product.halves)
                ]
                values = self._activated(halves, chunk) if name == "up" else halves[0]
                if residual is not None:
                    values = values + residual[chunk]
                self._store(name, layer, text, values, *chunk_rows(product, self._block, chunk))
            timeline.mark("stored")

    def _read_tokens(self, name: str, index, layer, norm, timeline: Timeline) -> TokenGrid | None:
        """Stores all tokens as the block multiplies them; returns the grid if there is one text."""
        shape, shared, block = self._shape, self._shared, self._block
        if shape.texts == 1:
            return self._read_token(name, layer, norm, team_of(shape, 0, self._warpgroup), timeline)
        for rank in ranks_of(block):
            team = team_of(shape, rank, self._warpgroup)
            grid = self._read_token(name, layer, norm, team, timeline)

            @when(team.exists & (team.part == 0))
            def _(team=team, grid=grid):
                store_grid(shared.code_sums, team.text, *grid)

            operands = shared.x_operand, shared.code_sums, block, shared.meet
            exchange_tokens(shape, name, index, team, *operands)
        return None

    def _read_token(self, name: str, layer, norm, team: Team, timeline: Timeline) -> TokenGrid | None:
        """Normalizes and quantizes a warpgroup's K slices of a token."""
        shape, shared, product = self._shape, self._shared, self._shape.products[name]
        starts, squares = slice_starts(team, shape.slices_of_warpgroup(name)), None
        source = self._of_text(getattr(self._sources, _INPUTS[name]), team.text)
        phase, first_of_pair = phase_bit(layer - 1 if name == "qkv" else layer), self._block
        if shape.texts > 1:
            first_of_pair = first_of_pair & ~1
        awaited = Awaited(phase, (rows_of(product, first_of_pair) > 0) & team.exists)
        k_slices = poll_slices(source, starts, product.k, awaited, team.count)
        timeline.mark("arrived")
        if name == "down" and shape.activation.rotation is not None:
            block, early = shape.activation.rotation.block, shape.rotated_early
            k_slices = k_slices if early == block else [end_rotation(x, block, early) for x in k_slices]
        kind, sizes, threads = self._ring.kind, (product.k, shape.norm_eps), (team, self._warpgroup, shared)
        if norm and shape.norm == "rms":
            squares = [x * x for x in k_slices]
            k_slices = [x * gain for x, gain in zip(k_slices, *norm, strict=True)]
        elif norm:
            k_slices = layer_normalized(k_slices, *norm, *sizes, *threads)
        token = TokenSlices(k_slices, squares)
        if shape.float_token is not None:
            return round_token(token, *sizes, kind, *threads)
        return quantize_token(token, *sizes, shape.token_format(name), kind, *threads)

    def _of_text(self, ref, text):
        """A text's part of a flat array of all texts."""
        size = ref.shape[0] // self._shape.texts
        return ref if self._shape.texts == 1 else ref.at[pl.ds(text * size, size)]

    def _residual(self, name: str, text) -> list[Float[Array, "128"]] | None:
        """What the product is added to, by chunk. This block wrote it itself, so there is nothing to poll for."""
        if name not in _RESIDUALS:
            return None
        source, product = self._of_text(getattr(self._sources, _RESIDUALS[name]), text), self._shape.products[name]
        rows = [chunk_rows(product, self._block, chunk) for chunk in range(product.chunks)]
        return [load_vector(source, first, first + count, product.by_parts) for first, count in rows]

    def _activated(self, halves, chunk: int) -> Float[Array, "128"]:
        """A chunk of the input of down, of gate and up or of one half, rotated as far as the block has the numbers."""
        activation, early = self._shape.activation, self._shape.rotated_early
        values = activations.ACCURATE[activation.function](halves[0])
        values = values * halves[1] if len(halves) == 2 else values
        if early > 1:
            # Attention's scratch. Each chunk has a row of its own: others may still read the last one's.
            row = self._warpgroup * WARPS + chunk % WARPS
            values = begin_rotation(self._shared.context_sums.at[row], values, activation.rotation.block, early)
        return values + 0.0  # -0 with phase bit 1 would be negative

    def _store(self, name: str, layer, text, values, first, count) -> None:
        """Stores a chunk of a product of a text."""
        product = self._shape.products[name]
        target = self._of_text(getattr(self._outs, WRITTEN[name]), text)
        if name == "qkv":
            target, first = rows_of_layer(product, target, layer), first + first_row(product, layer)
        store_vector(target, values, first, count, phase_bit(layer), product.by_parts)

    def _slice_starts(self, name: str):
        team = team_of(self._shape, 0, self._warpgroup)  # whose K slices do not depend on the rank
        return slice_starts(team, self._shape.slices_of_warpgroup(name))
