"""What blocks that share a head leave of its attention, and how it is put together."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, VECTOR, as_vector, thread_index, tree
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.decode_step.attention.cache_ring import place_of
from bipolar_jax.kernels.sm90.decode_step.config import HEAD_DIM, PARTIAL, TILE, LayersShape
from bipolar_jax.kernels.sm90.decode_step.polling import await_words, checked
from bipolar_jax.kernels.sm90.decode_step.vectors import store_vector


def clear(shape: LayersShape, block, partials, context, *, emulate: bool) -> None:
    """Takes the mark that others wait for off what this block will leave."""
    place = place_of(shape, block)
    nothing = plgpu.layout_cast(jnp.zeros(HEAD_DIM, jnp.float32), VECTOR)

    @pl.when(place.takes_part)
    def _():
        leave_partial(partials, place.record, nothing, 0.0, 0.0, 0, emulate)

    @pl.when(place.joins)
    def _():
        store_vector(context, nothing, place.head * HEAD_DIM + place.first, shape.joined, 0, emulate=emulate)


def join(shape: LayersShape, block, partials, context, mark, *, emulate: bool) -> None:
    """Puts together, of this block's head, what the blocks left that share it; each of them some of the numbers.

    The next product's token is then as short as any: to read all partial attentions in every block took longer than
    to have blocks wait for each other once more.
    """
    place = place_of(shape, block)

    @pl.when(place.joins)
    def _():
        head = (place.head, shape.splits, PARTIAL)
        numbers = await_joined(partials, *head, place.first, shape.joined, mark, emulate=emulate)
        store_vector(context, numbers, place.head * HEAD_DIM + place.first, shape.joined, mark, emulate=emulate)


def leave_partial(partials, record, values, largest, total, mark, emulate: bool) -> None:
    """Stores a partial attention: the sum of values, then in turn the largest score and the sum of weights."""
    start = record * PARTIAL
    store_vector(partials, values, start, HEAD_DIM, mark, emulate=emulate)
    even = lax.rem(plgpu.broadcasted_iota(jnp.int32, (HEAD_DIM,), 0, layout=VECTOR), 2) == 0
    store_vector(partials, jnp.where(even, largest, total), start + HEAD_DIM, TILE, mark, emulate=emulate)


def await_joined(
    partials,
    head: Int[Array, ""],
    records: int,
    size: int,
    start: Int[Array, ""],
    count: int,
    mark: Int[Array, ""],
    *,
    emulate: bool,
) -> Float[Array, "128"]:
    """Some numbers of a head's attention, put together from partial ones that other blocks leave.

    Args:
      partials: flat float32 in memory, `size` numbers each: the 128 of a sum of values, then, time and again, the
        largest score m (base 2) and the sum l of weights.
      head: whose.
      records: partial ones of a head.
      size: of a partial one.
      start: of the wanted numbers, a multiple of 32.
      count: of the wanted numbers, a power of two of at least 32.
      mark: of the numbers.

    Returns:
      sum_r 2^(m_r - M) values_r / sum_r 2^(m_r - M) l_r with M the largest m; again and again if count is not 128.
    """
    if emulate:
        every = checked(partials[...], mark).reshape(-1, records, size)[head]
        largest, total = every[:, 128], every[:, 129]
        weights = jnp.exp2(largest - jnp.max(largest))
        sums = jnp.sum(every[:, :128] * weights[:, None], axis=0)
        return (sums / jnp.sum(total * weights))[start + lax.iota(jnp.int32, WARPGROUP) % count]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SPLAT] * 3),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=VECTOR),
    )
    def inline(_, partials, head, start, mark):
        within = ptx.plus(start.registers.item(), ptx.bits_of(thread_index(), count - 1))
        base = ptx.pointer(partials, ptx.GLOBAL)
        base = ptx.advance_far(base, ptx.times(head.registers.item(), records * size), 4)
        places = []
        for record in range(records):
            place = ptx.advance(base, 4 * size * record)
            places += [(ptx.advance(place, 4 * 128), 2), (ptx.advance_far(place, within, 4), 1)]
        words = await_words(places, mark.registers.item(), ptx.int32(1))
        largest, totals = zip(*(map(ptx.as_float, pair) for pair in words[::2]), strict=True)
        values = [ptx.as_float(word) for (word,) in words[1::2]]
        most = tree(functools.partial(ptx.extreme, "max", "f32"), [ptx.as_word(number) for number in largest])
        minus_most = ptx.multiply(ptx.as_float(most), ptx.float32(-1))
        weights = [ptx.exp2(ptx.add(number, minus_most)) for number in largest]
        whole, total = (
            tree(ptx.add, [ptx.multiply(*pair) for pair in zip(some, weights, strict=True)])
            for some in (values, totals)
        )
        return as_vector(ptx.divide(whole, total), jnp.float32)

    return inline(partials, *(jnp.int32(number) for number in (head, start, mark)))
