"""Values: arrays of one number for each thread of a warpgroup."""

from __future__ import annotations

import numpy as np

THREADS, WARP = 128, 32


def int32(number):
    return np.full(THREADS, np.uint32(number & 0xFFFFFFFF)).view(np.int32)


def float32(number):
    return np.full(THREADS, number, np.float32)
