"""The tensors of a packed array in a file: written in the fewest bytes that hold every number exactly, and read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float32, Shaped, UInt32

from bipolar_jax.checkpoint.checksums import ChecksumError, block_checksums, checksum, plane_checksums
from bipolar_jax.checkpoint.packed_body import Description
from bipolar_jax.checkpoint.safetensors_reader import SafetensorsError, SafetensorsReader
from bipolar_jax.checkpoint.shards import in_shards, planes_in_shards, sums_in_shards
from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray
from bipolar_jax.packing.host_memory import aligned_empty
from bipolar_jax.packing.plane_sums import host_plane_sums
from bipolar_jax.packing.words import WORD_BITS, num_words
from bipolar_jax.quantize.groups import num_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups, check_scales

PLANES = "planes"
FIELDS = (PLANES, "scale", "offset", "row_sums", "groups.scale", "groups.offset")
_FLOATS = ("float32", "float16", "bfloat16")
_WHOLE = ("int8", "int16")


def stored_fields(array: BipolarArray) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a packed array by field.

    `scale` and `offset` have 16 bits where those hold every number exactly; an `offset` of whole multiples of the
    scale is stored as these multiples. Sums of codes are left out for groups of whole words, whose bits are counted
    when the file is read.
    """
    scale = np.asarray(array.scale, np.float32)
    fields = {PLANES: np.asarray(array.planes), "scale": _narrowest(scale)}
    if array.offset is not None:
        offset = np.asarray(array.offset, np.float32)
        multiples = _multiples(offset, scale)
        fields["offset"] = _narrowest(offset) if multiples is None else multiples
    if not _are_counted(array.group_size, array.groups is not None):
        fields["row_sums"] = np.asarray(array.row_sums)
    if array.groups is not None:
        fields["groups.scale"] = np.asarray(array.groups.scale)
        fields["groups.offset"] = np.asarray(array.groups.offset)
    return fields


def _are_counted(group_size: int | None, has_integer_groups: bool) -> bool:
    return group_size is not None and group_size % WORD_BITS == 0 and not has_integer_groups


def _narrowest(array: Float32[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The array with 16 bits a number, if all are the same numbers then."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            narrow = array.astype(dtype)
        if _same_bits(narrow.astype(np.float32), array):
            return narrow
    return array


def _multiples(offset: Float32[np.ndarray, "..."], scale: Float32[np.ndarray, "..."]) -> np.ndarray | None:
    """offset / scale as int8 or int16, if the float32 product with the scale gives the same offset."""
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.rint(np.divide(offset, scale, out=np.zeros_like(offset), where=scale != 0))
    for dtype in (np.int8, np.int16):
        limits = np.iinfo(dtype)
        multiples = np.clip(ratio, limits.min, limits.max).astype(dtype)
        if _same_bits(scale * multiples.astype(np.float32), offset):
            return multiples
    return None


def _same_bits(one: Float32[np.ndarray, "..."], other: Float32[np.ndarray, "..."]) -> bool:
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))


def check_finite(name: str, *arrays: Any) -> None:
    """Raises ValueError for NaN or Inf in scales or offsets, as `quantize` does."""
    for array in arrays:
        if array is not None and not np.isfinite(np.asarray(array, np.float32)).all():
            raise ValueError(f"{name or 'the array':.100} has scales or offsets that are not finite: quantize it again")


def read_tensor(
    file: SafetensorsReader, checksums: dict[str, Any], name: str, dtypes: tuple[str, ...]
) -> Shaped[np.ndarray, "*shape"]:
    """A tensor whose checksum is right.

    Raises:
      ChecksumError: it is not.
      SafetensorsError: another dtype than one of `dtypes`.
    """
    array = file.read(name)
    if checksum(array) != checksums[name]:
        raise ChecksumError(f"tensor {name:.100}")
    if array.dtype.name not in dtypes:
        raise SafetensorsError(f"tensor {name!r:.100} is {array.dtype.name}, expected {' or '.join(dtypes)}")
    return array


def read_packed(
    file: SafetensorsReader,
    checksums: dict[str, Any],
    name: str,
    description: Description,
    bits: int | None,
    shardings: BipolarArray | None = None,
) -> BipolarArray:
    """The packed array `name`, truncated to at most `bits` bits; the planes that are dropped are not read.

    Args:
      file: the open file.
      checksums: of all tensors.
      name: path of the array.
      description: its static attributes.
      bits: most bits, or None.
      shardings: of the array's leaves; of planes only the parts of this process's devices are kept. None puts the array
        on the default device.

    Raises:
      ChecksumError: a tensor does not match its checksum.
      SafetensorsError: tensors that do not fit the description or each other, or the shardings.
    """
    number_format = description.format
    dropped = 0 if bits is None or number_format.ternary else max(0, number_format.bits - bits)
    shorter = BipolarFormat(number_format.bits - dropped) if dropped else number_format
    k, group_size = description.contracted_size, description.group_size
    has_fields = {field: f"{name}.{field}" in checksums for field in ("offset", "groups.scale")}
    if shardings is not None and list(has_fields.values()) != [
        shardings.offset is not None,
        shardings.groups is not None,
    ]:
        raise SafetensorsError(f"packed array {name!r:.100} has other fields than its config asks for")
    of_planes = None if shardings is None else shardings.planes
    with _damage():
        planes = _read_planes(
            file, checksums, f"{name}.{PLANES}", (number_format.bits, num_words(k)), dropped, of_planes
        )
    rows = (*planes.shape[:-3], planes.shape[-2])

    def field(field_name, *dtypes, groups=group_size):
        array = read_tensor(file, checksums, f"{name}.{field_name}", dtypes)
        expected = (*rows, num_groups(k, groups))
        if array.shape != expected:
            raise SafetensorsError(f"tensor {name!r:.100}.{field_name} has shape {array.shape}, expected {expected}")
        return array

    def has(field_name):
        return f"{name}.{field_name}" in checksums

    groups = None
    if has("groups.scale"):
        if has("offset"):
            raise SafetensorsError(f"packed array {name!r:.100} has integer groups and float offsets")
        groups = IntegerGroups(field("groups.scale", "uint8"), field("groups.offset", "int8"))
        with _damage():
            check_scales("integer", number_format, group_size)
            groups.check(number_format, (*rows, num_groups(k, group_size)))
    shared = group_size if groups is None else None
    scale = field("scale", *_FLOATS, groups=shared).astype(np.float32, copy=False)
    offset = field("offset", *_FLOATS, *_WHOLE, groups=shared) if has("offset") else None
    if offset is not None and offset.dtype.name in _WHOLE:
        offset = scale * offset.astype(np.float32)
    with _damage():
        check_finite(name, scale, offset)
    counts = not has("row_sums") and _are_counted(group_size, groups is not None)
    sums = None if counts else field("row_sums", "int32", groups=shared)
    if dropped and groups is None:
        scale = scale * np.float32(2.0**dropped)
    elif dropped:
        groups = groups.without_planes(dropped)
    if (dropped or counts) and shardings is not None:
        sums = sums_in_shards(planes, groups, shorter, k, group_size, shardings.row_sums)
    elif dropped or counts:
        sums = host_plane_sums(planes, shorter, k, group_size)
        sums = sums if groups is None else groups.value_sums(sums, k, group_size)
    arrays = {"planes": planes, "scale": scale, "row_sums": sums, "groups": groups}
    arrays["offset"] = None if offset is None else offset.astype(np.float32, copy=False)
    if shardings is None:
        # device_put takes the buffers over on CPUs; there is no other reference to them.
        arrays = jax.device_put(arrays)
    else:
        wanted = {field: getattr(shardings, field) for field in arrays}
        with _damage():
            arrays = jax.tree.map(lambda a, s: in_shards(a, s) if isinstance(a, np.ndarray) else a, arrays, wanted)
    return BipolarArray(
        **arrays,
        format=shorter,
        contracted_size=k,
        axis=description.axis,
        group_size=group_size,
    )


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns the ValueErrors of checks of what was read into damage of the file."""
    try:
        yield
    except (ChecksumError, SafetensorsError):
        raise
    except ValueError as error:
        raise SafetensorsError(str(error)) from error


def _read_planes(
    file: SafetensorsReader,
    checksums: dict[str, Any],
    name: str,
    bits_and_words: tuple[int, int],
    dropped: int,
    sharding: Sharding | None = None,
) -> UInt32[Array | np.ndarray, "*batch planes n words"]:
    """The planes of a packed array without the `dropped` lowest ones, which are not read; cut, or on the host."""
    stored = file.tensors[name]
    if stored.dtype != "U32" or len(stored.shape) < 3 or stored.shape[-3::2] != bits_and_words:
        raise SafetensorsError(
            f"tensor {name!r:.100} is {stored.dtype:.20}{list(stored.shape)}, expected {bits_and_words[0]} planes with "
            f"{bits_and_words[1]} words a row"
        )
    *batch, bits, n, words = stored.shape
    expected = checksums[name]
    if sharding is not None and isinstance(expected, list) and all(isinstance(each, list) for each in expected):
        return planes_in_shards(file, name, expected, dropped, sharding)
    planes = aligned_empty((*batch, bits - dropped, n, words), np.uint32)
    plane_bytes = 4 * n * words
    for index, matrix in enumerate(planes.reshape(-1, *planes.shape[-3:])):
        file.read_bytes(stored.start + (index * bits + dropped) * plane_bytes, matrix)
    if not _are_intact(planes, checksums[name], dropped):
        raise ChecksumError(f"tensor {name:.100}")
    return planes if sharding is None else in_shards(planes, sharding)  # version 1 has checksums of whole planes


def _are_intact(planes: UInt32[np.ndarray, "*batch planes n words"], expected: Any, dropped: int) -> bool:
    """Whether planes match their checksums in the file, of version 2 or of version 1."""
    if not isinstance(expected, list):
        return False
    if all(isinstance(matrix, list) for matrix in expected):
        return block_checksums(planes) == [matrix[dropped:] for matrix in expected]
    return plane_checksums(planes) == expected[dropped:]
