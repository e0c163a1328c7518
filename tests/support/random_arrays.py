"""Random arrays, the same in every run."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32


def normal(*shape: int, seed: int = 0) -> Float32[np.ndarray, "..."]:
    """Standard normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
