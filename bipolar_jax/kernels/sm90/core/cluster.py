"""Shared memory that one block of a cluster of two sends to the other, counted by an mbarrier of the receiver.

A mailbox is an mbarrier in shared memory, two words. Each of its phases ends when its block has said how many bytes it
expects, and as many have come. Bulk copies bring them, so that no thread of either block moves them. Interpret mode has
no clusters: nothing is sent there. `clusters_at_once` says how many clusters of any size run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Bool, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.branches import as_integer
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, scalar_of, thread_index
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value

MAILBOX_WORDS = 2
COPY_UNIT = 16  # bytes: copies take multiples, at addresses that are multiples


class Section(NamedTuple):
    """Bytes of shared memory, at the same place in both blocks.

    Attributes:
      array: index of the array.
      start: of the bytes, a multiple of COPY_UNIT.
      size: of the bytes, a multiple of COPY_UNIT.
      sent: whether they are sent; True if that is known.
    """

    array: int
    start: Int[Array, ""]
    size: int
    sent: Bool[Array, ""] | bool


# Multiprocessors of each GPC, within which a cluster's blocks run. How a chip's 132 are spread differs; an H200 was
# seen to run fewer than 32 clusters of four blocks that have a multiprocessor each. This spread has room for 30.
_OF_GPCS = (18, 18, 18, 18, 16, 16, 14, 14)


def clusters_at_once(size: int, per_multiprocessor: int = 1) -> int:
    """Clusters of `size` blocks that run at the same time, with so many blocks a multiprocessor."""
    return sum(per_multiprocessor * multiprocessors // size for multiprocessors in _OF_GPCS)


@with_twin(lambda mailbox: None)
def open_mailbox(mailbox: Any) -> None:
    """Initializes a mailbox; called by one warpgroup, before the blocks meet."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inline(_, mailbox):
        with ptx.when(ptx.equal(thread_index(), 0)):
            inline_ptx("mbarrier.init.shared::cta.b64 [$0], 1;", _address(mailbox), has_side_effects=True)
            inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)

    inline(mailbox)


@with_twin(lambda mailbox, size: None)
def expect_mail(mailbox: Any, size: Int[Array, ""]) -> None:
    """Says how many bytes end the mailbox's phase; called by one warpgroup, which has waited for the phase before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def inline(_, mailbox, size):
        with ptx.when(ptx.equal(thread_index(), 0)):
            code = "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], $1;"
            inline_ptx(code, _address(mailbox), scalar_of(size), has_side_effects=True)

    inline(mailbox, jnp.int32(size))


@with_twin(lambda mailbox, phase: None)
def await_mail(mailbox: Any, phase: Int[Array, ""]) -> None:
    """Waits until a phase of the mailbox has ended: the low bit says which, of the current one and the one before.

    The lanes of a warp leave the loop together, as in `core.polling`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def inline(_, mailbox, phase):
        code = """{
          .reg .pred p;
        AGAIN:
          mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], $1;
          vote.sync.all.pred p, p, -1;
          @!p bra AGAIN;
        }"""
        operands = _address(mailbox), ptx.bits_of(scalar_of(phase), 1)
        inline_ptx(code, *operands, has_side_effects=True, convergent=True)

    inline(mailbox, jnp.int32(phase))


@with_twin(lambda mailbox, arrays, sections, wanted: plgpu.commit_smem())
def send_mail(mailbox: Any, arrays: Sequence[Any], sections: Sequence[Section], wanted: Bool[Array, ""]) -> None:
    """Sends sections of arrays to the same place in the other block, and counts them in its mailbox.

    A warpgroup calls it when its threads have written what it sends; it is a barrier of the warpgroup as well.

    Args:
      mailbox: of this block, at the same place as the other's.
      arrays: shared memory.
      sections: of the arrays.
      wanted: whether the other block expects them.
    """
    starts, conditions = [jnp.int32(section.start) for section in sections], [wanted]
    conditions += [section.sent for section in sections if section.sent is not True]
    splats = [*starts, *(as_integer(condition) for condition in conditions)]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (1 + len(arrays)), *[SPLAT] * len(splats)))
    def inline(_, mailbox, *operands):
        bases = [_address(array) for array in operands[: len(arrays)]]
        starts = [scalar_of(splat) for splat in operands[len(arrays) : len(arrays) + len(sections)]]
        wanted, *conditions = [scalar_of(splat) for splat in operands[len(arrays) + len(sections) :]]
        ptx.order_before_copies()
        ptx.synchronize()
        with ptx.when(ptx.bits_of(ptx.equal(thread_index(), 0), ptx.equal(wanted, 1))):
            other = _other_rank()
            their_mailbox, *theirs = (_in_other_block(address, other) for address in (_address(mailbox), *bases))
            for section, start in zip(sections, starts, strict=True):
                source, target = (ptx.plus(base[section.array], start) for base in (bases, theirs))
                if section.sent is True:
                    _copy(target, source, section.size, their_mailbox)
                else:
                    with ptx.when(ptx.equal(conditions.pop(0), 1)):
                        _copy(target, source, section.size, their_mailbox)

    inline(mailbox, *arrays, *splats)


# Below: for use within `plgpu.inline_mgpu`.


def _address(memref: Any) -> Value:
    """The address of shared memory as a word."""
    pointer: Pointer = ptx.pointer(memref, ptx.SHARED)
    return llvm.ptrtoint(ptx.i32_type(), pointer)


def _other_rank() -> Value:
    rank = inline_ptx("mov.u32 $0, %cluster_ctarank;", result_types=ptx.i32_type())
    return ptx.flip_bits(rank, 1)


def _in_other_block(address: Value, rank: Value) -> Value:
    return inline_ptx("mapa.shared::cluster.u32 $0, $1, $2;", address, rank, result_types=ptx.i32_type())


def _copy(target: Value, source: Value, size: int, mailbox: Value) -> None:
    code = f"cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [$0], [$1], {size}, [$2];"
    inline_ptx(code, target, source, mailbox, has_side_effects=True)
