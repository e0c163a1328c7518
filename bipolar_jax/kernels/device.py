"""The device that a computation will run on."""

from __future__ import annotations

import jax


def default_device() -> jax.Device:
    """The device that JAX places unplaced computations on: `jax_default_device` if it is set, else the process's first.

    A program that is lowered for another platform (ahead of time, or by `jax.jit(backend=...)`) is not seen here.
    """
    chosen = jax.config.jax_default_device
    return jax.local_devices(backend=chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
