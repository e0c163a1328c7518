"""Sums over the blocks of a cluster: each block adds up a share of the numbers, which all blocks send it.

Shares are stored straight into the receiver's shared memory, in the order of a warpgroup's registers: thread i adds
what threads i of all blocks have sent, without bank conflicts or a transposition. Each block begins with a receiver of
its own, so that the blocks do not all write to the same one at a time. Shares are added in the order of their senders.

Interpret mode has no memory of other blocks: there the shares are in global memory, int32 [receivers, senders, *share].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, as_array, numbers_of, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.core.wgmma import ACCUMULATOR

_QUAD = 4  # words of one access
_QUAD_BYTES = 4 * _QUAD * WARPGROUP  # of all threads

Share = tuple[int, int]  # rows, a multiple of 64, and columns, a multiple of 8


def buffer_shape(senders: int, share: Share) -> tuple[int, ...]:
    """A warpgroup's buffer of int32 in shared memory, for the shares of so many blocks."""
    return senders, share[0] * share[1] // (_QUAD * WARPGROUP), WARPGROUP, _QUAD


def _send_shares_twin(buffer, sums, corners, share, rank):
    for receiver, (row, column) in enumerate(corners):
        buffer[receiver, rank] = sums[row : row + share[0], column : column + share[1]]


@with_twin(_send_shares_twin)
def send_shares(
    buffer: Any,
    sums: Int[Array, "rows columns"],
    corners: Sequence[tuple[int, int]],
    share: Share,
    rank: Int[Array, ""],
) -> None:
    """Stores a share of this warpgroup's sums in the buffer of every block of the cluster, its own among them.

    Args:
      buffer: of `buffer_shape`, at the same place in all blocks.
      sums: in the layout ACCUMULATOR.
      corners: first row and column of each block's share, by the block's rank.
      share: rows and columns.
      rank: of this block in the cluster.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ACCUMULATOR, SPLAT))
    def inline(_, buffer, sums, rank):
        shares = [numbers_of(sums[row : row + share[0], column : column + share[1]]) for row, column in corners]
        store_shares(buffer, shares, scalar_of(rank))

    inline(buffer, sums, jnp.int32(rank))


@with_twin(lambda buffer, senders, share, rank: jnp.sum(buffer[rank], axis=0, dtype=jnp.int32))
def add_shares(buffer: Any, senders: int, share: Share, rank: Int[Array, ""]) -> Int[Array, "rows columns"]:
    """The sum of the shares that all blocks have sent to this one, in the layout ACCUMULATOR; see `send_shares`."""
    del rank  # memory is this block's own

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(share, jnp.int32, layout=ACCUMULATOR)
    )
    def inline(_, buffer):
        words = add_up(buffer, senders, share[0] * share[1] // WARPGROUP)
        return as_array(words, share, ACCUMULATOR, is_signed=True)

    return inline(buffer)


# Below: for use within `plgpu.inline_mgpu`.


def store_shares(buffer: Any, shares: Sequence[Sequence[Value]], rank: Value) -> None:
    """Stores this thread's words of every share in the buffers of the blocks whose they are."""
    place = ptx.plus(ptx.times(rank, 4 * WARPGROUP * len(shares[0])), ptx.times(thread_index(), 4 * _QUAD))
    mine = ptx.advance(ptx.pointer(buffer, ptx.SHARED), place)
    for sender in range(len(shares)):
        # A branch for each block: the order of its receivers is then that of registers, which no index can choose.
        with ptx.when(ptx.equal(rank, sender)):
            receivers = [(sender + turn) % len(shares) for turn in range(len(shares))]
            targets = [mine if receiver == sender else ptx.in_block(mine, receiver) for receiver in receivers]
            for quad in range(len(shares[0]) // _QUAD):
                for receiver, target in zip(receivers, targets, strict=True):
                    words = list(shares[receiver][_QUAD * quad : _QUAD * (quad + 1)])
                    ptx.store(ptx.advance(target, _QUAD_BYTES * quad), words)


def add_up(buffer: Any, senders: int, count: int) -> list[Value]:
    """The sums of this thread's `count` words of all shares."""
    quads = count // _QUAD
    mine = ptx.advance(ptx.pointer(buffer, ptx.SHARED), ptx.times(thread_index(), 4 * _QUAD))
    sums = []
    for quad in range(quads):
        total, *others = [
            ptx.load(ptx.advance(mine, _QUAD_BYTES * (sender * quads + quad)), _QUAD) for sender in range(senders)
        ]
        for words in others:
            total = [ptx.plus(a, b) for a, b in zip(total, words, strict=True)]
        sums += total
    return sums
