"""Sums of splits of K that blocks exchange within a kernel: each finishes some tokens of a tile, and no pass follows.

Blocks that multiply parts of K of one tile leave their sums in memory, in the order of their registers, count up an
arrival, and wait for the others'. A thread then adds up the sums of its own share of the tokens, which other blocks'
threads of its index left. All blocks must run at once. `split_sums` is the twin.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.sm90.core import ptx, wgmma
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, as_array, numbers_of, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, WARPGROUP
from bipolar_jax.kernels.sm90.core.polling import arrive, await_count, load_count, load_from_blocks
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value

TOKENS = 8  # columns of an accumulator of which a thread's four consecutive words are two
_WORDS = 4
ROUND = 8  # arrivals of all splits of a tile, so that another product of the same tokens counts on from a multiple
_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("exchanged", default=False)


@contextlib.contextmanager
def exchanged_sums() -> Iterator[None]:
    """Products that are traced within exchange the sums of splits of K where they can."""
    token = _enabled.set(True)
    try:
        yield
    finally:
        _enabled.reset(token)


def may_exchange() -> bool:
    """Whether sums are to be exchanged, and the device is not known to have too few multiprocessors for it."""
    return _enabled.get() and getattr(default_device(), "core_count", MULTIPROCESSORS) >= MULTIPROCESSORS


def exchange(
    total: Int[Array, "rows tokens"], sums, arrivals, tile: Int[Array, ""], split: Int[Array, ""], splits: int
) -> Int[Array, "rows share"]:
    """The sums over all of K of this split's share of a tile's tokens.

    Args:
      total: this split's sums of the tile, in the layout `wgmma.ACCUMULATOR`.
      sums: int32 [splits, rows * tokens] in memory, the tile's.
      arrivals: int32 [tiles] in memory, multiples of 8 before the kernel and after it.
      tile: index of the tile, below 2^24.
      split: of this block.
      splits: how many there are, 2, 4 or 8; tokens are a multiple of TOKENS times it.
    """
    rows, tokens = total.shape
    share = tokens // splits

    @plgpu.inline_mgpu(
        arg_types=(wgmma.ACCUMULATOR, plgpu.RefType(), plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((rows, share), jnp.int32, layout=wgmma.ACCUMULATOR),
    )
    def inline(_, total, sums, arrivals, tile, split):
        words, sums, split = numbers_of(total), ptx.pointer(sums, ptx.GLOBAL), scalar_of(split)
        arrived = ptx.advance(ptx.pointer(arrivals, ptx.GLOBAL), ptx.times(scalar_of(tile), 4))
        # Without this block's arrival the round cannot end: what is counted now says which round it is.
        counted = load_count(arrived)
        leave_sums(words, sums, split)
        arrive(arrived, ROUND // splits)
        await_count(arrived, ptx.plus(ptx.bits_of(counted, 2**32 - ROUND), ROUND))
        shared = add_shares(rows // wgmma.ROWS_PER_INSTRUCTION, tokens // TOKENS, sums, split, splits)
        return as_array(shared, (rows, share), wgmma.ACCUMULATOR, is_signed=True)

    return inline(total, sums, arrivals, jnp.int32(tile), jnp.int32(split))


def leave_sums(words: list[Value], sums: Pointer, split: Value) -> None:
    """Stores the thread's words where `add_shares` finds them, in [splits, words / 4, threads, 4]."""
    own = ptx.advance(sums, ptx.plus(ptx.times(split, 4 * WARPGROUP * len(words)), _offset_of_thread()))
    for first in range(0, len(words), _WORDS):
        ptx.store(ptx.advance(own, 4 * WARPGROUP * first), words[first : first + _WORDS])


def add_shares(blocks: int, groups: int, sums: Pointer, split: Value, splits: int) -> list[Value]:
    """The thread's share of the words, [blocks of 64 rows, groups of eight tokens, 4], added up over the splits."""
    share, group_bytes = groups // splits, 4 * WARPGROUP * _WORDS
    first = ptx.plus(ptx.times(split, share * group_bytes), _offset_of_thread())
    total = []
    for block in range(blocks):
        for group in range(block * groups, block * groups + share):
            parts = [
                load_from_blocks(ptx.advance(sums, ptx.plus(first, (other * blocks * groups + group) * group_bytes)))
                for other in range(splits)
            ]
            total += [functools.reduce(ptx.plus, words) for words in zip(*parts, strict=True)]
    return total


def _offset_of_thread() -> Value:
    return ptx.times(thread_index(), 4 * _WORDS)
