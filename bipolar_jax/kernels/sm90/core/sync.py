"""A warpgroup's threads wait for each other."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.emulation import with_twin


@with_twin(plgpu.commit_smem)
def synchronize() -> None:
    """The threads of the warpgroup wait for each other, and see what each wrote to shared memory.

    `plgpu.commit_smem` waits for all loads and stores that are under way, memory's too; it is for what tensor cores
    or copies read.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def inline(_, nothing):
        ptx.synchronize()

    inline(jnp.int32(0))
