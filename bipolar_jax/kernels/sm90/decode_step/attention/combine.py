"""Partial attentions: what blocks that share a head write, and how they are combined to the head's context."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, VECTOR, as_vector, scalar_of, thread_index, tree
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.polling import poll_words
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import assign_head
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import HEAD_DIM, PARTIAL_SIZE, TILE, LayersShape
from bipolar_jax.kernels.sm90.decode_step.cooperative.polling import Awaited, nan_unless_in_phase
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import store_vector


def clear(shape: LayersShape, block, partials, context) -> None:
    """Gives what this block will write phase bit 0, which no block polls for in the first layer."""
    assigned = assign_head(shape, block)
    zeros = plgpu.layout_cast(jnp.zeros(HEAD_DIM, jnp.float32), VECTOR)

    @pl.when(assigned.active)
    def _():
        store_partial(partials, assigned.partial, zeros, 0.0, 0.0, 0)

    @pl.when(assigned.combines)
    def _():
        store_vector(context, zeros, assigned.head * HEAD_DIM + assigned.first, shape.combined, 0)


def combine(shape: LayersShape, block, partials, context, phase) -> None:
    """Combines the partial attentions of this block's head; each of the head's blocks does some of the elements.

    The next product's blocks then read a token as short as any other. If they all read all partial attentions, it took
    longer than this additional wait.
    """
    assigned = assign_head(shape, block)

    @pl.when(assigned.combines)
    def _():
        values = poll_combined(partials, assigned.head, shape.splits, assigned.first, shape.combined, Awaited(phase, 1))
        store_vector(context, values, assigned.head * HEAD_DIM + assigned.first, shape.combined, phase)


def store_partial(partials, index, values, largest, total, phase) -> None:
    """Stores a partial attention: the weighted sum of values; then, in turn, the largest score and the sum of weights.

    Args:
      partials: flat float32 in global memory, PARTIAL_SIZE for each partial attention.
      index: of the partial attention.
      values: [HEAD_DIM] in the layout VECTOR.
    """
    start = index * PARTIAL_SIZE
    store_vector(partials, values, start, HEAD_DIM, phase)
    even = lax.rem(plgpu.broadcasted_iota(jnp.int32, (HEAD_DIM,), 0, layout=VECTOR), 2) == 0
    store_vector(partials, jnp.where(even, largest, total), start + HEAD_DIM, TILE, phase)


def _poll_combined_twin(partials, head, splits, start, count, awaited):
    of_head = nan_unless_in_phase(partials[...], awaited.phase).reshape(-1, splits, PARTIAL_SIZE)[head]
    largest, totals = of_head[:, HEAD_DIM], of_head[:, HEAD_DIM + 1]
    weights = jnp.exp2(largest - jnp.max(largest))
    sums = jnp.sum(of_head[:, :HEAD_DIM] * weights[:, None], axis=0)
    return (sums / jnp.sum(totals * weights))[start + lax.iota(jnp.int32, WARPGROUP) % count]


@with_twin(_poll_combined_twin)
def poll_combined(
    partials, head: Int[Array, ""], splits: int, start: Int[Array, ""], count: int, awaited: Awaited
) -> Float[Array, "128"]:
    """Elements of a head's context, combined from partial attentions that other blocks write.

    With values_r, m_r and l_r from `store_partial` and M the largest m_r:
    sum_r 2^(m_r - M) values_r / sum_r 2^(m_r - M) l_r.

    Args:
      partials: flat float32 in global memory, `splits` of PARTIAL_SIZE for each head.
      head: whose.
      splits: partial attentions of a head.
      start: of the elements, a multiple of 32.
      count: of the elements, a power of two from 32 on; a smaller count than 128 repeats them.
      awaited: what to poll for.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * 3),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
    )
    def inline(_, partials, head, start, phase):
        element = ptx.plus(scalar_of(start), ptx.bits_of(thread_index(), count - 1))
        base = ptx.pointer(partials, ptx.GLOBAL)
        base = ptx.advance_far(base, ptx.times(scalar_of(head), splits * PARTIAL_SIZE), 4)
        loads = []
        for split in range(splits):
            partial = ptx.advance(base, 4 * PARTIAL_SIZE * split)
            loads += [(ptx.advance(partial, 4 * HEAD_DIM), 2), (ptx.advance_far(partial, element, 4), 1)]
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

    return inline(partials, *(jnp.int32(number) for number in (head, start, awaited.phase)))
