"""Pairs device functions with twins for interpret mode; `launch_kernel` selects which run, and names the module.

Interpret mode runs a kernel on a CPU and has no inline PTX or MLIR. A function that uses them is paired with a twin:
plain jnp with the same arguments and results. `launch_kernel` selects for the whole body of the kernel.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


def launch_kernel(body: Callable, *, interpret: plgpu.InterpretGPUParams | None, **options) -> Callable:
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
                _name_module(options.get("kernel_name") or body.__name__)
            return body(*refs, **scratch)
        finally:
            _interpreted.reset(token)

    kernel = plgpu.kernel(traced, interpret=interpret, **options)

    def call(*operands):
        # Indices and counters are int32: `jax_enable_x64` would make int64 of some of them.
        with jax.enable_x64(False):
            return kernel(*operands)

    return call


def _name_module(name: str) -> None:
    """Within a kernel's body: names its dumps, else Mosaic GPU numbers modules in their order; caches compare bytes."""

    @plgpu.inline_mgpu()
    def inline(_):
        operation = ir.InsertionPoint.current.block.owner.operation
        while operation.parent is not None:
            operation = operation.parent.operation
        operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)

    inline()


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
