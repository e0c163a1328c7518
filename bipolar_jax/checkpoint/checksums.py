"""Checksums of tensors, which cover dtype, shape and every bit of the data."""

from __future__ import annotations

import zlib

import numpy as np


def checksum(array: np.ndarray) -> int:
    """crc32 of dtype, shape and data."""
    return zlib.crc32(_bytes(np.ascontiguousarray(array)), _of_description(array.dtype, array.shape))


def plane_checksums(planes: np.ndarray) -> list[int]:
    """One checksum per plane, low plane first, so that a reader can check the high planes alone."""
    *batch, bits, n, words = planes.shape
    found = []
    for plane in range(bits):
        value = _of_description(planes.dtype, (*batch, n, words))
        for index in np.ndindex(*batch):  # matrix by matrix, because a plane of a stack is not contiguous
            value = zlib.crc32(_bytes(np.ascontiguousarray(planes[(*index, plane)])), value)
        found.append(value)
    return found


def _of_description(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return zlib.crc32(f"{dtype.name}{list(shape)}".encode())


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
