"""Host memory that JAX takes over without a copy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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
