"""Threads: their index, control flow, and exchanges within a warp."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from bipolar_jax.kernels.sm90.core.ptx.integers import bits_of
from bipolar_jax.kernels.sm90.core.ptx.types import Value, i32_type, int32


def thread_in_warpgroup() -> Value:
    return bits_of(mgpu.thread_idx(), 127)


def opaque(word: Value) -> Value:
    """The same word, opaque to the compiler: nothing computed from it moves out of a loop."""
    return inline_ptx("mov.b32 $0, $1;", word, result_types=i32_type(), has_side_effects=True)


def clock() -> Value:
    """The low word of the multiprocessor's clock."""
    return inline_ptx("mov.u32 $0, %clock;", result_types=i32_type(), has_side_effects=True)


def nanoseconds() -> Value:
    """The low word of the device's time."""
    return inline_ptx("mov.u32 $0, %globaltimer_lo;", result_types=i32_type(), has_side_effects=True)


def synchronize(lanes_apart: bool = False) -> None:
    """A barrier of the warpgroup's threads.

    Lanes may leave a loop that waits for an mbarrier one after the other. `bar.sync` wants whole warps: a warp that
    comes in two groups counts twice, and the second group waits for ever. A shuffle after the loop brings the lanes
    together; where there is none, `barrier.sync` does, for some instructions and registers.

    Args:
      lanes_apart: whether there is no shuffle between such a loop and this.
    """
    if lanes_apart:
        index = mgpu_utils.warpgroup_barrier_idx(sync=False)
        inline_ptx(f"barrier.sync $0, {mgpu_utils.WARPGROUP_SIZE};", index, has_side_effects=True)
    else:
        mgpu.warpgroup_barrier()


def meet_block() -> None:
    """A barrier of all threads of a block; lanes of a warp may come one after the other."""
    inline_ptx("barrier.sync 0;", has_side_effects=True)


def synchronize_warp() -> None:
    """A barrier of the warp's threads, beyond which the compiler moves no load of shared memory."""
    inline_ptx("bar.warp.sync -1;", has_side_effects=True, convergent=True)


def meet_cluster() -> None:
    """A barrier of all threads of a cluster; after it each sees what the others wrote, to global memory too."""
    inline_ptx("barrier.cluster.arrive.release;", has_side_effects=True)
    inline_ptx("barrier.cluster.wait.acquire;", has_side_effects=True)


def when(condition: Value) -> AbstractContextManager:
    """Code emitted within runs where the condition holds."""
    return mgpu.when(condition)


def repeat(count: int, values: list[Value], body: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
    """Carries values through body(0, values), body(1, values), ..."""
    return list(mgpu.fori(int32(count), values)(body).results)


def update_if(condition: Value, values: list[Value], body: Callable[[], list[Value]]) -> list[Value]:
    """body() where the condition holds, else the values unchanged."""
    branch = scf.IfOp(condition, [value.type for value in values], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.YieldOp(body())
    with ir.InsertionPoint(branch.else_block):
        scf.YieldOp(values)
    return list(branch.results)


def exchange(word: Value, distance: int) -> Value:
    """The word of the lane whose index differs in the bit `distance`; all lanes of the warp take part."""
    ptx = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    return inline_ptx(ptx, word, result_types=i32_type(), has_side_effects=True, convergent=True)


def from_lane(word: Value, lane: Value) -> Value:
    """The word of another lane; all lanes of the warp take part."""
    ptx = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
    return inline_ptx(ptx, word, lane, result_types=i32_type(), has_side_effects=True, convergent=True)


def over_warp(kind: str, word: Value) -> Value:
    """ "add", "max" or "min" of the signed words of all lanes of the warp, which take part."""
    ptx = f"redux.sync.{kind}.s32 $0, $1, -1;"
    return inline_ptx(ptx, word, result_types=i32_type(), has_side_effects=True, convergent=True)
