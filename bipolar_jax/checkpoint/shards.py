"""Tensors of a packed file, read straight into the parts that this process's devices have."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Int, Shaped, UInt32

from bipolar_jax.checkpoint.checksums import BLOCK_ROWS, ChecksumError, checksum
from bipolar_jax.checkpoint.safetensors_reader import SafetensorsError, SafetensorsReader
from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.host_memory import aligned_empty
from bipolar_jax.packing.plane_sums import plane_sums
from bipolar_jax.quantize.integer_groups import IntegerGroups

# First and last element, exclusive, along each axis of an array.
Bounds = tuple[tuple[int, int], ...]


def in_shards(array: Shaped[np.ndarray, "*shape"], sharding: Sharding) -> Shaped[Array, "*shape"]:
    """An array of the host, of which each device gets its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def planes_in_shards(
    file: SafetensorsReader, name: str, expected: list[list[list[int]]], dropped: int, sharding: Sharding
) -> UInt32[Array, "*batch planes n words"]:
    """The planes `name` without the `dropped` lowest ones, in the parts that `sharding` gives to devices.

    Blocks of rows are read and checked one by one, each once, and only those of which a device here has a part. A row
    is read whole, because its checksum covers all of k.

    Raises:
      ChecksumError: a block does not match its checksum.
      SafetensorsError: there are not as many checksums as blocks, as in files of version 1.
    """
    *batch, bits, n, words = file.tensors[name].shape
    shape = (*batch, bits - dropped, n, words)
    parts = {device: _bounds(index, shape) for device, index in sharding.addressable_devices_indices_map(shape).items()}
    numbers = read_parts(file, name, expected, dropped, set(parts.values()))
    arrays = [jax.device_put(numbers[part], device) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_parts(
    file: SafetensorsReader, name: str, expected: list[list[list[int]]], dropped: int, parts: Collection[Bounds]
) -> dict[Bounds, UInt32[np.ndarray, "*batch planes n words"]]:
    """Parts of the planes `name` without the `dropped` lowest ones. Raises as `planes_in_shards`."""
    *batch, bits, n, words = file.tensors[name].shape
    starts = range(0, n, BLOCK_ROWS)
    counts = [(len(matrix), {len(plane) for plane in matrix}) for matrix in expected]
    if counts != [(bits, {len(starts)})] * math.prod(batch):
        raise SafetensorsError(f"tensor {name!r:.100} has not one checksum for every {BLOCK_ROWS} rows of a plane")
    found = {part: aligned_empty(tuple(stop - start for start, stop in part), np.uint32) for part in parts}
    block = aligned_empty((min(BLOCK_ROWS, n), words), np.uint32)
    planes = itertools.product(enumerate(np.ndindex(*batch)), range(dropped, bits), enumerate(starts))
    for (matrix, at), plane, (number, start) in planes:
        stop, index = min(start + BLOCK_ROWS, n), (*at, plane - dropped)
        wanted = [part for part in found if _has(part, index) and _overlap(part[-2], (start, stop))]
        if not wanted:
            continue
        rows = block[: stop - start]
        file.read_bytes(file.tensors[name].start + ((matrix * bits + plane) * n + start) * words * 4, rows)
        if checksum(rows) != expected[matrix][plane][number]:
            raise ChecksumError(f"tensor {name:.100}")
        for part in wanted:
            _copy(rows, start, part, index, found[part])
    return found


def _copy(rows: np.ndarray, start: int, part: Bounds, index: tuple[int, ...], buffer: np.ndarray) -> None:
    """Copies what a part has of rows from `start` on."""
    (first_row, last_row), (first_word, last_word) = part[-2:]
    low, high = max(start, first_row), min(start + len(rows), last_row)
    place = tuple(i - bounds[0] for i, bounds in zip(index, part, strict=False))
    buffer[(*place, slice(low - first_row, high - first_row))] = rows[low - start : high - start, first_word:last_word]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _has(part: Bounds, index: tuple[int, ...]) -> bool:
    return all(start <= i < stop for i, (start, stop) in zip(index, part, strict=False))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def sums_in_shards(
    planes: UInt32[Array, "*batch planes n words"],
    groups: IntegerGroups | None,
    number_format: BipolarFormat,
    k: int,
    group_size: int | None,
    sharding: Any,
) -> Int[Array, "*batch n scales"]:
    """Row sums of planes that are cut over devices, counted there; of values with integer groups."""

    @functools.partial(jax.jit, out_shardings=sharding)
    def sums(planes, groups):
        codes = plane_sums(planes, number_format, k, group_size)
        return codes if groups is None else groups.value_sums(codes, k, group_size)

    return sums(planes, groups)
