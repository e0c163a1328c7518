"""Checksums of tensors, which cover dtype, shape and every bit of the data."""

from __future__ import annotations

import zlib

import numpy as np


def checksum(array: np.ndarray) -> int:
    """crc32 of dtype, shape and data."""
    header = f"{array.dtype.name}{list(array.shape)}".encode()
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), zlib.crc32(header))


def plane_checksums(planes: np.ndarray) -> list[int]:
    """One checksum per plane, low plane first, so that a reader can check the high planes alone."""
    return [checksum(planes[..., plane, :, :]) for plane in range(planes.shape[-3])]
