"""Where the Hopper kernels can run: on the GPU, or interpreted for tests."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax

from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.unsupported import Unsupported

if TYPE_CHECKING:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

_interpret_params: contextvars.ContextVar[InterpretGPUParams | None] = contextvars.ContextVar(
    "interpret_params", default=None
)


@contextlib.contextmanager
def interpreted(params: InterpretGPUParams) -> Iterator[None]:
    """Runs kernels that are traced within in Pallas' GPU interpret mode, slowly, on any device: for tests.

    A function jitted within stays interpreted afterwards: JAX's cache does not know of this setting.
    """
    token = _interpret_params.set(params)
    try:
        yield
    finally:
        _interpret_params.reset(token)


def interpret_params() -> InterpretGPUParams | None:
    """Parameters of interpret mode, or None if it is off."""
    return _interpret_params.get()


def is_hopper(device: jax.Device) -> bool:
    """Whether a device has the instructions that these kernels use."""
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def check_runnable() -> None:
    """Raises Unsupported unless the default device is a Hopper GPU, or interpret mode is on."""
    device = default_device()
    if interpret_params() is None and not is_hopper(device):
        raise Unsupported(f"its kernels need an NVIDIA GPU of compute capability 9.0, not {device.device_kind}")
