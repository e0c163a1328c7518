"""Partial attentions: what blocks that share a head write, and how they are combined to the head's context."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, VECTOR, as_vector, scalar_of, thread_index, tree
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.polling import poll_words
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import assign_head
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import TILE, LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import Awaited, nan_unless_in_phase
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import store_vector


def clear(shape: LayersShape, block, partials, context) -> None:
    """Gives what this block will write phase bit 0, which no block polls for in the first layer."""
    assigned = assign_head(shape, block)
    zeros = plgpu.layout_cast(jnp.zeros(WARPGROUP, jnp.float32), VECTOR)

    @when(assigned.active)
    def _():
        for head in range(shape.heads_at_once):
            store_partial(shape, partials, assigned.partial + head * shape.splits, zeros, 0.0, 0.0, 0)

    @when(assigned.combines)
    def _():
        store_vector(context, zeros, assigned.unit * shape.head_dim + assigned.first, shape.combined, 0)


def combine(shape: LayersShape, block, partials, context, phase) -> None:
    """Combines the partial attentions of this block's heads; each of their blocks does some of the elements.

    The next product's blocks then read a token as short as any other. If they all read all partial attentions, it took
    longer than this additional wait.
    """
    assigned = assign_head(shape, block)

    @when(assigned.combines)
    def _():
        unit, start = assigned.unit, assigned.first
        if shape.heads_at_once > 1:
            unit, start = unit + lax.div(start, shape.head_dim), lax.rem(start, shape.head_dim)
        values = poll_combined(shape, partials, unit, start, Awaited(phase, 1))
        store_vector(context, values, assigned.unit * shape.head_dim + assigned.first, shape.combined, phase)


def store_partial(shape: LayersShape, partials, index, values, largest, total, phase) -> None:
    """Stores a partial attention: the weighted sum of values; then, in turn, the largest score and the sum of weights.

    Args:
      partials: flat float32 in global memory, `partial_size` for each partial attention.
      index: of the partial attention.
      values: the head's elements, in the layout VECTOR; of shorter heads the rest means nothing.
    """
    start = index * shape.partial_size
    store_vector(partials, values, start, shape.head_dim, phase)
    even = lax.rem(plgpu.broadcasted_iota(jnp.int32, (WARPGROUP,), 0, layout=VECTOR), 2) == 0
    store_vector(partials, jnp.where(even, largest, total), start + shape.head_dim, TILE, phase)


def _poll_combined_twin(shape, partials, unit, start, awaited):
    of_head = nan_unless_in_phase(partials[...], awaited.phase).reshape(-1, shape.splits, shape.partial_size)[unit]
    largest, totals = of_head[:, shape.head_dim], of_head[:, shape.head_dim + 1]
    weights = jnp.exp2(largest - jnp.max(largest))
    sums = jnp.sum(of_head[:, : shape.head_dim] * weights[:, None], axis=0)
    return (sums / jnp.sum(totals * weights))[start + lax.iota(jnp.int32, WARPGROUP) % shape.combined]


@with_twin(_poll_combined_twin)
def poll_combined(
    shape: LayersShape, partials, unit: Int[Array, ""], start: Int[Array, ""], awaited: Awaited
) -> Float[Array, "128"]:
    """Elements of a head's context, combined from partial attentions that other blocks write.

    There are `shape.combined` of them, which the vector repeats.

    With values_r, m_r and l_r from `store_partial` and M the largest m_r:
    sum_r 2^(m_r - M) values_r / sum_r 2^(m_r - M) l_r.

    Args:
      partials: flat float32 in global memory, `splits` of `partial_size` for each head.
      unit: index of the head among those of all texts.
      start: of the elements, a multiple of 32.
      awaited: what to poll for.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * 3),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
    )
    def inline(_, partials, unit, start, phase):
        element = ptx.plus(scalar_of(start), ptx.bits_of(thread_index(), shape.combined - 1))
        base = ptx.pointer(partials, ptx.GLOBAL)
        base = ptx.advance_far(base, ptx.times(scalar_of(unit), shape.splits * shape.partial_size), 4)
        loads = []
        for split in range(shape.splits):
            partial = ptx.advance(base, 4 * shape.partial_size * split)
            loads += [(ptx.advance(partial, 4 * shape.head_dim), 2), (ptx.advance_far(partial, element, 4), 1)]
        words = poll_words(loads, scalar_of(phase), ptx.int32(awaited.needed))
        largest, totals = zip(*(map(ptx.as_float, pair) for pair in words[::2]), strict=True)
        values = [ptx.as_float(word) for (word,) in words[1::2]]
        most = tree(functools.partial(ptx.extreme, "max", "f32"), [ptx.as_word(number) for number in largest])
        minus_most = ptx.multiply(ptx.as_float(most), ptx.float32(-1))
        weights = [ptx.exp2(ptx.add(number, minus_most)) for number in largest]
        numerator, denominator = (
            tree(ptx.add, [ptx.multiply(*pair) for pair in zip(terms, weights, strict=True)])
            for terms in (values, totals)
        )
        return as_vector(ptx.divide(numerator, denominator), jnp.float32)

    return inline(partials, *(jnp.int32(number) for number in (unit, start, awaited.phase)))
