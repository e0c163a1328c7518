"""Runs one kernel once at a small size and checks its result, for compute-sanitizer to watch.

`python -m tests.gpu.sanitized KERNEL` prints "checked: KERNEL" if the result is right. "planted race" and "planted
write" are kernels with a defect that racecheck and memcheck must report: if they do not, the tool sees nothing.
"""

from __future__ import annotations

import argparse
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core import ptx
from tests.gpu.cases import (
    attention,
    decode_step,
    expanded_products,
    float_groups,
    float_products,
    heads,
    prepared_few_tokens,
    products,
    quantizer,
    scaled_products,
    signs,
    weight_only,
    weights,
)
from tests.gpu.trial import Case, Trial, one_program, run_cases

MODULES = (
    products,
    expanded_products,
    float_groups,
    prepared_few_tokens,
    scaled_products,
    weight_only,
    float_products,
    quantizer,
    weights,
    heads,
    signs,
    attention,
    decode_step,
)
KERNELS: dict[str, Case] = {name: case for module in MODULES for name, case in module.small().items()}
# What each tool must find: the tool's name by the defect's.
PLANTED = {"planted race": "racecheck", "planted write": "memcheck"}
_FAR = 1 << 28  # elements beyond an array: an address that no allocation has


def planted(defect: str) -> Trial:
    """A kernel with a defect of PLANTED; its result is not checked."""
    return {"planted race": _planted_race, "planted write": _planted_write}[defect]()


def _planted_race() -> Trial:
    """Threads read from shared memory what others write, of their own warp and of another, with no barrier between."""

    def kernel(x, out, shared):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType()))
        def inline(_, x, out, shared):
            thread = ptx.thread_in_warpgroup()
            at = ptx.times(thread, 4)
            words, source, target = ptx.pointer(shared, ptx.SHARED), *(ptx.pointer(r, ptx.GLOBAL) for r in (x, out))
            values = ptx.load(ptx.advance(source, at), 1)
            for flipped in (64, 1, 65):
                ptx.store(ptx.advance(words, at), values)
                values = ptx.load(ptx.advance(words, ptx.times(ptx.flip_bits(thread, flipped), 4)), 1)
            ptx.store(ptx.advance(target, at), values)

        inline(x, out, shared)

    return _one_kernel(kernel, "planted_race", [plgpu.SMEM((128,), jnp.float32)], num_threads=1)


def _planted_write() -> Trial:
    """Writes far beyond the end of its output."""

    def kernel(x, out):
        out[pl.ds(lax.axis_index("block") * _FAR + _FAR, 128)] = x[...]

    return _one_kernel(kernel, "planted_write", [], num_threads=1)


def _one_kernel(kernel, name: str, scratch, num_threads: int) -> Trial:
    def run(x):
        return plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
            grid=(1,),
            grid_names=("block",),
            num_threads=num_threads,
            thread_name="warpgroup",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            kernel_name=name,
        )(x)

    return one_program(run, (np.arange(128, dtype=np.float32),), lambda out: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=[*KERNELS, *PLANTED])
    name = parser.parse_args().kernel
    case = Case(name, lambda: planted(name)) if name in PLANTED else KERNELS[name]
    (outcome,) = run_cases([case], threads=1)
    if outcome.error is not None:
        sys.exit(f"wrong: {name}: {outcome.error}")
    print(f"checked: {name}", flush=True)
    # Without JAX's teardown, in which processes under racecheck crash before their reports are written.
    os._exit(0)


if __name__ == "__main__":
    main()
