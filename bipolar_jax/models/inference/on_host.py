"""Results that several processes have parts of, on the host of each."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_host(array: Any) -> np.ndarray:
    """The whole array, of which other processes may have parts: all of them call this in the same order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
