"""Bounds the time that a kernel waits: a wait on an mbarrier that traps, and a check of the device.

Blocks that wait for each other must all be resident. Mosaic launches an ordinary grid (JAX 0.11.2 has no cooperative
launch), so nothing promises that: another kernel may hold a multiprocessor. A wait that exceeds its limit traps. The
host gets CUDA_ERROR_LAUNCH_FAILED at its next synchronization, and the process has to be restarted, as after any device
fault. The device prints no message: a call of vprintf or __assertfail makes ptxas serialize the kernel's wgmma (C7510).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, as_splat, scalar_of

_PAUSE_NS = 64  # between tests of a barrier: a warpgroup that spins takes issue slots from the others


@with_twin(lambda barrier, limit_ms: plgpu.barrier_wait(barrier))
def wait_or_trap(barrier, limit_ms: int) -> None:
    """`plgpu.barrier_wait` for a limited time, for a warpgroup that is not in a hurry.

    Args:
      barrier: an mbarrier in shared memory.
      limit_ms: milliseconds after which the threads trap.
    """

    def pause(carry):
        _, start = carry
        start = _pause_or_trap(start, limit_ms)
        return plgpu.barrier_test(barrier), start

    lax.while_loop(lambda carry: ~carry[0], pause, (plgpu.barrier_test(barrier), jnp.int32(0)))


def _pause_or_trap(start: Int[Array, ""], limit_ms: int) -> Int[Array, ""]:
    """Sleeps briefly, and traps once the limit has passed since `start`; 0 starts the time. Returns the start.

    Time is in units of 2^20 ns, so that it wraps after weeks.
    """
    limit = -(-limit_ms * 10**6 // 2**20)

    @plgpu.inline_mgpu(arg_types=(SPLAT,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT))
    def inline(_, start):
        code = f"""{{
      .reg .pred p;
      .reg .b32 now;
      .reg .b64 time;
      nanosleep.u32 {_PAUSE_NS};
      mov.u64 time, %globaltimer;
      shr.u64 time, time, 20;
      cvt.u32.u64 now, time;
      setp.eq.u32 p, $1, 0;
      selp.b32 $0, now, $1, p;
      sub.u32 now, now, $0;
      setp.gt.u32 p, now, {limit};
      @p trap;
    }}"""
        types = ptx.i32_type()
        return as_splat(inline_ptx(code, scalar_of(start), result_types=types, has_side_effects=True), True)

    return inline(start)


@with_twin(lambda count: None)
def trap_if_fewer_multiprocessors(count: int) -> None:
    """Traps on a device that cannot have as many multiprocessors: %nsmid is their number, or more."""

    @plgpu.inline_mgpu()
    def inline(_):
        code = f"""{{
      .reg .pred fewer;
      .reg .b32 multiprocessors;
      mov.u32 multiprocessors, %nsmid;
      setp.lt.u32 fewer, multiprocessors, {count};
      @fewer trap;
    }}"""
        inline_ptx(code, has_side_effects=True)

    inline()
