"""Pairs device functions with twins for interpret mode; the kernel's launch selects which of the two run.

Interpret mode runs a kernel on a CPU and has no inline PTX or MLIR. A function that uses them is paired with a twin:
plain jnp with the same arguments and results. `launch_kernel` selects for the whole body of the kernel.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.module_name import keep_module_name

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


def launch_kernel(body: Callable, *, interpret: plgpu.InterpretGPUParams | None, **options: Any) -> Callable:
    """`plgpu.kernel(body, ...)`; if `interpret` is given, the body calls the twins of device functions.

    Args:
      body: the kernel's body.
      interpret: parameters of interpret mode, or None on a GPU.
      **options: passed to `plgpu.kernel`.
    """

    def traced(*refs, **scratch):
        token = _interpreted.set(interpret is not None)
        try:
            if interpret is None:
                keep_module_name(options.get("kernel_name") or body.__name__)
            return body(*refs, **scratch)
        finally:
            _interpreted.reset(token)

    kernel = plgpu.kernel(traced, interpret=interpret, **options)

    def call(*operands):
        # Indices and counters are int32: `jax_enable_x64` would make int64 of some of them.
        with jax.enable_x64(False):
            return kernel(*operands)

    return call


def is_interpreted() -> bool:
    """Whether the kernel being traced runs in interpret mode; for the few places where a twin is not enough."""
    return _interpreted.get()


def with_twin(twin: Callable) -> Callable[[Callable], Callable]:
    """Decorates a device function with its twin, which has the same signature and runs in interpret mode."""

    def pair(device: Callable) -> Callable:
        @functools.wraps(device)
        def function(*args, **kwargs):
            return (twin if is_interpreted() else device)(*args, **kwargs)

        return function

    return pair
