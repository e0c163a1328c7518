"""Bounds the time that a kernel waits: a wait on an mbarrier that traps, and a check of the device.

Blocks that wait for each other must all be resident. Mosaic launches an ordinary grid (JAX 0.11.2 has no cooperative
launch), so nothing promises that: another kernel may hold a multiprocessor. A wait that exceeds its limit traps. The
host gets CUDA_ERROR_LAUNCH_FAILED at its next synchronization, and the process has to be restarted, as after any device
fault. The device prints no message: a call of vprintf or __assertfail makes ptxas serialize the kernel's wgmma (C7510).
"""

from __future__ import annotations

import jax
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu import lowering, primitives
from jax._src.state.primitives import get_ref_and_transforms
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jaxlib.mlir.dialects import arith, memref

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin

_SUSPENSION_NS = 10_000_000  # of a thread, at most, in each attempt of a wait; Mosaic's own waits take the same

# `plgpu.inline_mgpu` takes no barriers, so the wait is a primitive of its own, like `primitives.barrier_wait_p`.
_wait_or_trap_p = Primitive("wait_or_trap")
_wait_or_trap_p.multiple_results = True


@with_twin(lambda barrier, limit_ms: plgpu.barrier_wait(barrier))
def wait_or_trap(barrier, limit_ms: int) -> None:
    """`plgpu.barrier_wait` for a limited time.

    Args:
      barrier: an mbarrier in shared memory.
      limit_ms: milliseconds after which the threads trap. The time starts when a first attempt to wait has failed,
        which takes some milliseconds at most.
    """
    barrier, transforms = get_ref_and_transforms(barrier, None, "wait_or_trap")
    leaves, tree = jax.tree.flatten(transforms)
    _wait_or_trap_p.bind(barrier, *leaves, tree=tree, limit_ms=limit_ms)


@_wait_or_trap_p.def_effectful_abstract_eval
def _wait_has_an_effect(barrier, *leaves, tree, limit_ms):
    return (), {mosaic_core._memory_effect}


@lowering.register_lowering_rule(_wait_or_trap_p, plgpu.LoweringSemantics.Lane)
def _lower_wait(ctx, barrier, *leaves, tree, limit_ms):
    index = primitives._get_barrier_base_index(ctx.avals_in[0], tree.unflatten(leaves))
    if index is not None:
        barrier = barrier[index]
    # As mgpu's BarrierRef.wait: the parities of all barriers are bits of one word.
    parity, parities = barrier.update_parities(memref.load(barrier.phases, []))
    memref.store(parities, barrier.phases, [])
    code = f"""{{
      .reg .pred p;
      .reg .b64 start, now;
      mbarrier.try_wait.parity.shared.b64 p, [$0], $1, {_SUSPENSION_NS};
      @p bra DONE;
      mov.u64 start, %globaltimer;
    AGAIN:
      mbarrier.try_wait.parity.shared.b64 p, [$0], $1, {_SUSPENSION_NS};
      @p bra DONE;
      mov.u64 now, %globaltimer;
      sub.u64 now, now, start;
      setp.lt.u64 p, now, {limit_ms * 10**6};
      @p bra AGAIN;
      trap;
    DONE:
    }}"""
    inline_ptx(code, barrier.get_ptr(), arith.extui(ptx.i32_type(), parity), has_side_effects=True)
    return ()


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
