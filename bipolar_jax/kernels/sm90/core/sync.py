"""How the threads of a warpgroup wait for each other, and order their memory accesses."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin


@with_twin(lambda lanes_apart=False: plgpu.commit_smem())
def synchronize(lanes_apart: bool = False) -> None:
    """A barrier of the warpgroup's threads; after it each sees what the others wrote to shared memory.

    `plgpu.commit_smem` also waits for all loads and stores in flight, those of global memory too. It is for what tensor
    cores or TMA read.

    Args:
      lanes_apart: whether the lanes of a warp may come one after the other, see `ptx.synchronize`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def inline(_, nothing):
        ptx.synchronize(lanes_apart)

    inline(jnp.int32(0))


def _meet_twin(barrier):
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


@with_twin(_meet_twin)
def meet_block(barrier) -> None:
    """A barrier of all threads of a block, after which each sees what the others wrote to shared memory.

    Args:
      barrier: a `plgpu.Barrier` with an arrival for each warpgroup for interpret mode; else of no use, and may be None.
    """

    @plgpu.inline_mgpu()
    def inline(_):
        ptx.meet_block()

    inline()


@with_twin(_meet_twin)
def meet_cluster(barrier) -> None:
    """A barrier of all threads of a cluster, after which each sees what the others wrote to global memory.

    Unlike a `plgpu.ClusterBarrier` it needs no fences around it.

    Args:
      barrier: a `plgpu.ClusterBarrier` for interpret mode; else of no use, and may be None.
    """

    @plgpu.inline_mgpu()
    def inline(_):
        ptx.meet_cluster()

    inline()


@with_twin(lambda: None)
def fence_gpu() -> None:
    """Orders this thread's accesses of global memory with those of other blocks.

    A barrier of a cluster orders a block's own accesses only: a fence on either side of it makes what this block wrote
    visible to the others, and what they wrote to this one.
    """

    @plgpu.inline_mgpu()
    def inline(_):
        ptx.fence_gpu()

    inline()
