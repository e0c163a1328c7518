"""Checksums that change with any bit, the dtype or the shape of a tensor."""

from __future__ import annotations

import zlib

import numpy as np


def checksum(array: np.ndarray) -> int:
    """crc32 of dtype, shape and bytes."""
    header = f"{array.dtype.name}{list(array.shape)}".encode()
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), zlib.crc32(header))


def plane_checksums(planes: np.ndarray) -> list[int]:
    """One for every plane, low plane first, so that the top ones can be checked without the rest."""
    return [checksum(planes[..., plane, :, :]) for plane in range(planes.shape[-3])]
