"""Arrays in host memory: buffers that JAX takes over without a copy, and results that several processes share."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

# XLA on CPUs takes a buffer over if it is aligned to this many bytes.
_ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "*shape"]:
    """Uninitialized memory that `jax.device_put` does not copy on CPUs."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def is_shared(array: Any) -> bool:
    """Whether other processes have parts of an array that this one lacks."""
    return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def on_host(array: Any) -> np.ndarray:
    """The whole array. If processes share it, all of them call this in the same order, and each device has it whole for
    a moment.
    """
    return np.asarray(multihost_utils.process_allgather(array, tiled=True) if is_shared(array) else array)
