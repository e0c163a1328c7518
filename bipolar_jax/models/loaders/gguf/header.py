"""A strict walk over the header of a GGUF file, before anything else reads it.

GGUFReader trusts the counts in the file: a damaged array length makes it loop
for ever, a damaged tensor size makes it allocate. This walk holds each length,
count and offset against the bytes that are there, and each tensor against the
place where the one before it ends. It allocates nothing that grows with them.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path

# Tensor types we dequantize: number in the file -> (name, weights in a block, bytes of a block).
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
# Metadata value types of fixed size: number in the file -> bytes. 8 is a string, 9 an array.
_FIXED_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32
# Fewest bytes of a key with its value, and of a tensor's description: bound the two counts.
_MIN_KEY_VALUE, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor's description. Its data lies wholly within the file.

    Attributes:
      name: as in the file.
      shape: numpy order, outermost first: the reverse of the file's.
      type_name: one of TENSOR_TYPES.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str


def check_gguf(path: str | os.PathLike[str]) -> list[GGUFTensor]:
    """Walks the header and returns what it says of the tensors.

    Raises:
      FileNotFoundError: no file at `path`.
      ValueError: the file is not GGUF, is damaged or cut short, or has a tensor of a type we do not read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise ValueError(f"{path} is empty: download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data, size).run()


class _Walk:
    """A position in the mapped file; every step checks that it stays inside."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self._path, self._data, self._size = path, data, size
        self._at = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def run(self) -> list[GGUFTensor]:
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
                raise self._damaged(f"tensor {tensor.name!r} is there twice")
            # Tensors lie in order, each at the next aligned place, as llama.cpp demands too.
            if offset != expected_offset:
                raise self._damaged(f"tensor {tensor.name!r} is at offset {offset}, expected {expected_offset}")
            tensors[tensor.name] = tensor
            ends.append((tensor.name, offset + nbytes))
            expected_offset = self._aligned(offset + nbytes)
        start = self._aligned(self._at)
        for name, end in ends:
            if start + end > self._size:
                raise self._damaged(
                    f"tensor {name!r} ends at byte {start + end:,}, but the file has {self._size:,} bytes"
                )
        return list(tensors.values())

    def _tensor(self) -> tuple[GGUFTensor, int, int]:
        """Description, offset in the data section and bytes of one tensor."""
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
            raise self._damaged(f"metadata key {key!r} is there twice")
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
            self._at += count * _FIXED_SIZES[kind]
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

    def _string(self, what: str) -> str:
        (length,) = self._unpack("<Q", what)
        self._check_count(length, 1, f"bytes of {what}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} at byte {self._at - length:,} is not UTF-8 ({error.reason})") from error

    def _unpack(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout), what))

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._damaged(f"it ends after {self._size:,} bytes, inside {what} at byte {self._at:,}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count * min_bytes > self._size - self._at:
            raise self._damaged(
                f"it announces {count:,} {what} at byte {self._at:,}, but only {self._size - self._at:,} bytes follow"
            )

    def _aligned(self, position: int) -> int:
        return -(-position // self._alignment) * self._alignment

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path} is a damaged or incomplete GGUF file: {what}; download it again")


def _type_name(number: int) -> str:
    """The type's name where the gguf library knows it, with its number."""
    from bipolar_jax.extras import require

    try:
        return f"{require('gguf', 'models').GGMLQuantizationType(number).name} ({number})"
    except ValueError:
        return str(number)
