"""Validates the header of a GGUF file before the gguf library reads it.

GGUFReader trusts the file: a damaged array length makes it loop forever, a damaged tensor size makes it
allocate. This check compares each length, count and offset with the file's size, and each tensor's offset
with the end of the previous tensor. It allocates nothing in proportion to stored lengths.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path

# Supported tensor types: number in the file -> (name, weights per block, bytes per block).
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
# Metadata value types of fixed size: number in the file -> bytes.
_FIXED_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32
# Least bytes of a key with its value, and of a tensor's description; they bound the two counts.
_MIN_KEY_VALUE, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """The description of a tensor whose data lies within the file.

    Attributes:
      name: name in the file.
      shape: outermost dimension first, the reverse of the file's order.
      type_name: one of TENSOR_TYPES.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str


def check_gguf(path: str | os.PathLike[str]) -> list[GGUFTensor]:
    """Validates the header and returns the descriptions of the tensors.

    Raises:
      FileNotFoundError: no file at `path`.
      ValueError: the file is not GGUF, is damaged or truncated, or has a tensor of an unsupported type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise ValueError(f"{path} is empty: download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _HeaderReader(path, data, size).read()


class _HeaderReader:
    """Reads the mapped file from a position that every read advances, with bounds checks."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self._path, self._data, self._size = path, data, size
        self._position = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def read(self) -> list[GGUFTensor]:
        """The descriptions of all tensors."""
        magic = self._take(4, "magic")
        if magic != b"GGUF":
            raise ValueError(f"{self._path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
        (version,) = self._unpack("<I", "version")
        if version not in _VERSIONS:
            raise ValueError(
                f"{self._path} has GGUF version {version}, supported are little-endian versions 2 and 3: "
                "convert the file again, or download it again if it should be one of them"
            )
        tensor_count, key_count = self._unpack("<QQ", "counts")
        self._check_count(key_count, _MIN_KEY_VALUE, "metadata keys")
        keys = set()
        for _ in range(key_count):
            keys.add(self._key_value(keys))
        self._check_count(tensor_count, _MIN_TENSOR, "tensors")
        return self._tensors(tensor_count)

    def _tensors(self, count: int) -> list[GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        ends = []
        expected_offset = 0
        for _ in range(count):
            tensor, offset, nbytes = self._tensor()
            if tensor.name in tensors:
                raise self._damaged(f"tensor {tensor.name!r} occurs twice")
            # Each tensor starts at the next aligned offset after the previous one, as llama.cpp requires.
            if offset != expected_offset:
                raise self._damaged(f"tensor {tensor.name!r} is at offset {offset}, expected {expected_offset}")
            tensors[tensor.name] = tensor
            ends.append((tensor.name, offset + nbytes))
            expected_offset = self._aligned(offset + nbytes)
        start = self._aligned(self._position)
        for name, end in ends:
            if start + end > self._size:
                raise self._damaged(
                    f"tensor {name!r} ends at byte {start + end:,}, but the file has {self._size:,} bytes"
                )
        return list(tensors.values())

    def _tensor(self) -> tuple[GGUFTensor, int, int]:
        """A tensor's description, its offset in the data section, and its size in bytes."""
        name = self._string("tensor name")
        (rank,) = self._unpack("<I", f"rank of tensor {name!r}")
        if not 1 <= rank <= _MAX_DIMS:
            raise self._damaged(f"tensor {name!r} has {rank} dimensions, allowed are 1 to {_MAX_DIMS}")
        dims = self._unpack(f"<{rank}Q", f"shape of tensor {name!r}")
        type_number, offset = self._unpack("<IQ", f"type of tensor {name!r}")
        if type_number not in TENSOR_TYPES:
            supported = ", ".join(type_name for type_name, _, _ in TENSOR_TYPES.values())
            raise ValueError(
                f"{self._path}: tensor {name!r} has type {_type_name(type_number)}, supported are {supported}: "
                "convert the model to one of these, or download it again if it should be one"
            )
        type_name, block, block_bytes = TENSOR_TYPES[type_number]
        if min(dims) < 1 or dims[0] % block:
            raise self._damaged(f"tensor {name!r} has shape {dims[::-1]}, impossible for type {type_name}")
        return GGUFTensor(name, dims[::-1], type_name), offset, math.prod(dims) // block * block_bytes

    def _key_value(self, known: set[str]) -> str:
        key = self._string("metadata key")
        if key in known:
            raise self._damaged(f"metadata key {key!r} occurs twice")
        (kind,) = self._unpack("<I", f"type of metadata key {key!r}")
        if key == "general.alignment":
            self._alignment = self._read_alignment(kind)
        elif kind == _ARRAY:
            self._array(key)
        else:
            self._value(kind, key)
        return key

    def _read_alignment(self, kind: int) -> int:
        if kind != _UINT32:
            raise self._damaged(f"general.alignment has value type {kind}, expected {_UINT32} (uint32)")
        (alignment,) = self._unpack("<I", "general.alignment")
        if alignment.bit_count() != 1:
            raise self._damaged(f"general.alignment is {alignment}, expected a power of two")
        return alignment

    def _array(self, key: str) -> None:
        kind, count = self._unpack("<IQ", f"array of metadata key {key!r}")
        if kind in _FIXED_SIZES:
            self._check_count(count, _FIXED_SIZES[kind], f"values of metadata key {key!r}")
            self._position += count * _FIXED_SIZES[kind]
        elif kind == _STRING:
            self._check_count(count, 8, f"strings of metadata key {key!r}")
            for _ in range(count):
                self._string(key)
        else:
            raise self._damaged(f"metadata key {key!r} is an array of unknown value type {kind}")

    def _value(self, kind: int, key: str) -> None:
        if kind == _STRING:
            self._string(key)
        elif kind in _FIXED_SIZES:
            self._take(_FIXED_SIZES[kind], key)
        else:
            raise self._damaged(f"metadata key {key!r} has unknown value type {kind}")

    def _string(self, item: str) -> str:
        (length,) = self._unpack("<Q", item)
        self._check_count(length, 1, f"bytes of {item}")
        try:
            return self._take(length, item).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{item} at byte {self._position - length:,} is not UTF-8 ({error.reason})") from error

    def _unpack(self, layout: str, item: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout), item))

    @property
    def _remaining(self) -> int:
        return self._size - self._position

    def _take(self, count: int, item: str) -> bytes:
        if count > self._remaining:
            raise self._damaged(f"it ends after {self._size:,} bytes, inside {item} at byte {self._position:,}")
        self._position += count
        return self._data[self._position - count : self._position]

    def _check_count(self, count: int, min_bytes: int, item: str) -> None:
        if count * min_bytes > self._remaining:
            raise self._damaged(
                f"it announces {count:,} {item} at byte {self._position:,}, but only {self._remaining:,} bytes follow"
            )

    def _aligned(self, position: int) -> int:
        return -(-position // self._alignment) * self._alignment

    def _damaged(self, problem: str) -> ValueError:
        return ValueError(f"{self._path} is a damaged or incomplete GGUF file: {problem}; download it again")


def _type_name(number: int) -> str:
    """The type's name, if the gguf library knows it, and number."""
    from bipolar_jax.extras import require

    try:
        return f"{require('gguf', 'models').GGMLQuantizationType(number).name} ({number})"
    except ValueError:
        return str(number)
