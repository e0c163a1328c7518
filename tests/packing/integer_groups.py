"""Random weights with integer groups, in NumPy, so that nothing compiles before a kernel does."""

from __future__ import annotations

import dataclasses

import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.quantize.integer_groups import IntegerGroups
from tests.support.integer_products import random_codes


@dataclasses.dataclass(frozen=True)
class GroupedCodes:
    """Weights s * u + o: codes u, and s and o of each group."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    group_size: int

    @property
    def values(self) -> np.ndarray:
        """int64 [n, k], from -128 to 127."""
        group = np.arange(self.codes.shape[1]) // self.group_size
        return self.scale[:, group].astype(np.int64) * self.codes + self.offset[:, group]


def random_groups(fmt: BipolarFormat, n: int, k: int, group_size: int, seed: int = 0) -> GroupedCodes:
    """Any s and o that the format allows; the first group of the first two rows takes the extremes."""
    rng, groups = np.random.default_rng(seed), -(-k // group_size)
    scale = rng.integers(1, 255 // fmt.max_value + 1, (n, groups))
    scale[:2, 0] = 255 // fmt.max_value
    span = scale * fmt.max_value
    offset = -128 + rng.integers(0, 256 - span)
    offset[0, 0], offset[1, 0] = -128, 127 - span[1, 0]
    codes = random_codes(fmt, n, k, seed + 1)
    return GroupedCodes(codes, scale.astype(np.uint8), offset.astype(np.int8), group_size)


def packed_planes(codes: np.ndarray, fmt: BipolarFormat) -> np.ndarray:
    """`packing.words.pack_codes`."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 32)))
    planes = np.stack([fmt.bit(codes, plane) for plane in range(fmt.bits)]).astype(np.uint8)
    return np.packbits(planes, axis=-1, bitorder="little").view(np.uint32)


def array_of_codes(codes: np.ndarray, fmt: BipolarFormat, scale: np.ndarray) -> BipolarArray:
    """The array [k, n] with one scale a column."""
    sums = codes.sum(1, keepdims=True, dtype=np.int32)
    return BipolarArray(packed_planes(codes, fmt), scale[:, None], None, sums, fmt, codes.shape[1], -2, None)


def array_of_groups(grouped: GroupedCodes, fmt: BipolarFormat, scale: np.ndarray) -> BipolarArray:
    """The array [k, n] with integer groups below one scale a column."""
    return dataclasses.replace(
        array_of_codes(grouped.codes, fmt, scale),
        row_sums=grouped.values.sum(1, keepdims=True).astype(np.int32),
        group_size=grouped.group_size,
        groups=IntegerGroups(grouped.scale, grouped.offset),
    )
