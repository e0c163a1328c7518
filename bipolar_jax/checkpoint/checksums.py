"""Checksums of tensors, which cover dtype, shape and every bit of the data."""

from __future__ import annotations

import zlib

import numpy as np

BLOCK_ROWS = 1024


class ChecksumError(ValueError):
    """The message names the part of a file that does not match its checksum."""


def checksum(array: np.ndarray) -> int:
    """crc32 of dtype, shape and data."""
    return zlib.crc32(_bytes(np.ascontiguousarray(array)), _of_description(array.dtype, array.shape))


def block_checksums(planes: np.ndarray) -> list[list[list[int]]]:
    """Of every matrix, plane (low plane first) and `BLOCK_ROWS` rows, so that a reader can check the part it reads."""
    starts = range(0, planes.shape[-2], BLOCK_ROWS)
    return [
        [[checksum(plane[start : start + BLOCK_ROWS]) for start in starts] for plane in matrix]
        for matrix in planes.reshape(-1, *planes.shape[-3:])
    ]


def plane_checksums(planes: np.ndarray) -> list[int]:
    """One checksum per plane, low plane first, as files of version 1 have them."""
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
