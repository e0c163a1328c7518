"""Device functions, their twins for interpret mode, and the launch that says which of the two a kernel runs.

Interpret mode runs a kernel on a CPU and knows no inline PTX or MLIR. A function that uses them is paired with a twin:
plain jnp with the same arguments and results. `launch_kernel` decides for everything that its kernel's body calls.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


def launch_kernel(body: Callable, *, interpret: plgpu.InterpretGPUParams | None, **options: Any) -> Callable:
    """`plgpu.kernel(body, ...)`; where `interpret` is given, `body` calls the twins of device functions.

    Args:
      body: of the kernel.
      interpret: parameters of interpret mode, or None on a GPU.
      **options: of `plgpu.kernel`.
    """

    def traced(*refs, **scratch):
        token = _interpreted.set(interpret is not None)
        try:
            return body(*refs, **scratch)
        finally:
            _interpreted.reset(token)

    return plgpu.kernel(traced, interpret=interpret, **options)


def is_interpreted() -> bool:
    """Whether the kernel whose body is traced runs in interpret mode. For code that has to differ beyond a twin."""
    return _interpreted.get()


def with_twin(twin: Callable) -> Callable[[Callable], Callable]:
    """Pairs the device function that it decorates with its twin for interpret mode, of the same signature."""

    def pair(device: Callable) -> Callable:
        @functools.wraps(device)
        def function(*args, **kwargs):
            return (twin if is_interpreted() else device)(*args, **kwargs)

        return function

    return pair
