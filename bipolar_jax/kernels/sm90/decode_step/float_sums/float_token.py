"""Rounds a token's numbers to 16-bit floats, and stores them as `mma` reads them beside prepared weights.

A step of the token is 16 words: four for each lane of four that share a row of the weights, in the order [lane, half,
pair, 2] of `prepared_weights.token_order`. Loads of a lane's four words have no bank conflicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import K_SLICE_LAYOUT, SPLAT, numbers_of, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.core.wgmma import K_SLICE
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import STAGES_PER_SLICE
from bipolar_jax.packing.fields import STEPS, TokenOrder, positions_of

FLOAT_SLICE_WORDS = K_SLICE // 2
STEP_WORDS, LANE_WORDS = 16, 4  # of a step; of a lane, in it
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16}


def float_words_of(numbers: Float[Array, "1024"], order: TokenOrder) -> UInt32[Array, "512"]:
    """The words of a slice of 16-bit floats, in jnp."""
    positions = positions_of(numbers, order)
    # [half, lane, 2, pair] to [lane, half, pair, 2].
    ordered = positions.reshape(-1, 2, 4, 2, 2).transpose(0, 2, 1, 4, 3)
    return lax.bitcast_convert_type(ordered.reshape(-1, 2), jnp.uint32)


def float_positions_of(words: UInt32[Array, "512"], float_type: str) -> Float[Array, "stages positions"]:
    """The numbers of a slice by stage and position, in jnp."""
    numbers = lax.bitcast_convert_type(words, DTYPES[float_type])
    positions = numbers.reshape(-1, 4, 2, 2, 2).transpose(0, 2, 1, 4, 3)
    return positions.reshape(STAGES_PER_SLICE, STEPS * 2 * STEP_WORDS)


def _store_floats_twin(operand, k_slices, indices, starts, k, factor, float_type, order):
    for index, numbers, start in zip(indices, k_slices, starts, strict=True):

        @when(start < k)
        def _(index=index, numbers=numbers):
            scaled = numbers if factor is None else numbers * factor
            operand[index] = float_words_of(scaled.astype(DTYPES[float_type]), order)


@with_twin(_store_floats_twin)
def store_floats(
    operand: Any,
    k_slices: Sequence[Float[Array, "1024"]],
    indices: Sequence[Int[Array, ""]],
    starts: Sequence[Int[Array, ""]],
    k: int,
    factor: Float[Array, ""] | None,
    float_type: str,
    order: TokenOrder,
) -> None:
    """Rounds K slices times the factor, and stores those that begin before K.

    Args:
      operand: shared memory, uint32 [K slices, FLOAT_SLICE_WORDS].
      k_slices: numbers, 0 beyond K.
      indices: of the slices in `operand`.
      starts: index in K of their first elements.
      k: the contracted size.
      factor: of all numbers, or None.
      float_type: "bf16" or "f16".
      order: that positions follow, see `packing.fields`.
    """
    count, factors = len(k_slices), [] if factor is None else [factor]
    types = [plgpu.RefType(), *[SPLAT] * len(factors), *[K_SLICE_LAYOUT] * count, *[SPLAT] * (2 * count)]

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def inline(_, operand, *arrays):
        thread, first_word = thread_index(), ptx.pointer(operand, ptx.SHARED)
        factor, arrays = arrays[: len(factors)], arrays[len(factors) :]
        slices, indices, starts = (arrays[i * count : (i + 1) * count] for i in range(3))
        for numbers, index, start in zip(slices, indices, starts, strict=True):
            numbers = numbers_of(numbers)
            if factor:
                numbers = [ptx.multiply(number, scalar_of(factor[0])) for number in numbers]
            target = ptx.advance(first_word, ptx.times(scalar_of(index), 4 * FLOAT_SLICE_WORDS))
            store = STORES[order]
            store(target, thread, rounded_pairs(float_type, numbers), ptx.less(scalar_of(start), k))

    inline(operand, *factors, *k_slices, *map(jnp.int32, indices), *map(jnp.int32, starts))


# Below: for use within `plgpu.inline_mgpu`.


def rounded_pairs(float_type: str, numbers: Sequence[Value]) -> list[Value]:
    """Numbers as words of two."""
    halves = [ptx.rounded(float_type, number) for number in numbers]
    return [ptx.pick_bytes(low, high, 0x5410) for low, high in zip(halves[::2], halves[1::2], strict=True)]


def store_elements(target: Pointer, thread: Value, words: Sequence[Value], stored: Value) -> None:
    """Stores a thread's eight numbers of a slice, four words, where positions follow floats: a word is a lane's pair.

    Args:
      target: of the slice.
      thread: with elements 8 thread onwards: pair p of half h of a step, where thread is 4 step + 2 h + p.
      words: the numbers.
      stored: whether to.
    """
    own = list(words)
    for bit in (2, 1):  # four threads exchange what is each other's: word t of thread q becomes word q of thread t
        is_high = ptx.equal(ptx.bits_of(thread, bit), bit)
        for low in (0, 1) if bit == 2 else (0, 2):
            received = ptx.exchange(ptx.choose(is_high, own[low], own[low + bit]), bit)
            own[low], own[low + bit] = (
                ptx.choose(is_high, received, own[low]),
                ptx.choose(is_high, own[low + bit], received),
            )
    with ptx.when(stored):
        ptx.store(ptx.advance(target, ptx.times(thread, 4 * LANE_WORDS)), own)


def store_interleaved(target: Pointer, thread: Value, words: Sequence[Value], stored: Value) -> None:
    """`store_elements` where position 4 j + i is element 8 i + j."""
    own = [word for half in range(2) for word in paired(*transposed(words[2 * half : 2 * half + 2], thread))]
    with ptx.when(stored):
        ptx.store(ptx.advance(target, ptx.times(thread, 4 * LANE_WORDS)), own)


def paired(low: Value, high: Value) -> list[Value]:
    """Four numbers, two a word, as the pairs of `floats.PAIRS`: numbers 0 and 2, and 1 and 3."""
    return [ptx.pick_bytes(low, high, selector) for selector in (0x5410, 0x7632)]


def transposed(words: Sequence[Value], thread: Value) -> list[Value]:
    """Number i of thread 4 s + t is number t of thread 4 s + i's four, two a word."""
    low, high = words
    is_high, is_odd = (ptx.equal(ptx.bits_of(thread, bit), bit) for bit in (2, 1))
    received = ptx.exchange(ptx.choose(is_high, low, high), 2)
    # Numbers 2 h and 2 h + 1, h = t // 2, of the threads t % 2 and t % 2 + 2.
    first, second = ptx.choose(is_high, received, low), ptx.choose(is_high, high, received)
    received = ptx.exchange(_picked(is_odd, first, second, 0x5410, 0x7632), 1)
    return [_picked(is_odd, first, received, 0x3254, 0x5410), _picked(is_odd, second, received, 0x3276, 0x7610)]


def _picked(is_odd: Value, a: Value, b: Value, odd: int, even: int) -> Value:
    return ptx.pick_bytes(a, b, ptx.choose(is_odd, ptx.int32(odd), ptx.int32(even)))


STORES = {"bytes": store_interleaved, "floats": store_elements}
