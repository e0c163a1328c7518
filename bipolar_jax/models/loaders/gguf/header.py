"""Reads and validates the header of a GGUF file.

The gguf library's own reader trusts the file: a damaged array length makes it loop forever, a damaged tensor size
makes it allocate, and an intact array costs it hundreds of bytes for every byte. This reader compares each length,
count and offset with the file's size, and each tensor's offset with the end of the previous tensor. It keeps only
the arrays that the loader needs.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

# Supported tensor types: number in the file -> (name, weights per block, bytes per block).
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
# Metadata value types of fixed size: number in the file -> struct's and NumPy's letter.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FIXED_SIZES = {kind: struct.calcsize(f"<{letter}") for kind, letter in _FIXED.items()}
# The arrays that are kept, and the end of the names of others.
_ARRAYS = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores", "merges")}
_PATTERN = ".attention.sliding_window_pattern"
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32
_LENGTH = struct.Struct("<Q")
# Least bytes of a key with its value, and of a tensor's description; they bound the two counts.
_MIN_KEY_VALUE, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """The description of a tensor whose data lies within the file.

    Attributes:
      name: name in the file.
      shape: outermost dimension first, the reverse of the file's order.
      type_name: one of TENSOR_TYPES.
      start: offset of the data in the file, in bytes.
      row_bytes: size of one row of the innermost dimension.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    start: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class UnreadArray:
    """The value of an array that is not kept."""

    def __repr__(self) -> str:
        return "an array"


def check_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[GGUFTensor]]:
    """Validates the header; returns the metadata by key, and the descriptions of the tensors.

    Values are numbers, texts, lists, or `UnreadArray` for arrays that the loader does not need.

    Raises:
      FileNotFoundError: no file at `path`.
      PermissionError: the file is not readable.
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
        self._values: dict[str, Any] = {}

    def read(self) -> tuple[dict[str, Any], list[GGUFTensor]]:
        """The metadata by key, and the descriptions of all tensors."""
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
        for _ in range(key_count):
            self._key_value()
        self._check_count(tensor_count, _MIN_TENSOR, "tensors")
        return self._values, self._tensors(tensor_count)

    def _tensors(self, count: int) -> list[GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        expected_offset = 0
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in tensors:
                raise self._damaged(f"tensor {tensor.name!r:.100} occurs twice")
            # Each tensor starts at the next aligned offset after the previous one, as llama.cpp requires.
            if tensor.start != expected_offset:
                raise self._damaged(
                    f"tensor {tensor.name!r:.100} is at offset {tensor.start}, expected {expected_offset}"
                )
            tensors[tensor.name] = tensor
            expected_offset = self._aligned(tensor.start + tensor.nbytes)
        start = self._aligned(self._position)
        placed = [dataclasses.replace(tensor, start=start + tensor.start) for tensor in tensors.values()]
        for tensor in placed:
            end = tensor.start + tensor.nbytes
            if end > self._size:
                raise self._damaged(
                    f"tensor {tensor.name!r:.100} ends at byte {end:,}, but the file has {self._size:,} bytes"
                )
        return placed

    def _tensor(self) -> GGUFTensor:
        """A tensor's description, with its offset in the data section."""
        name = self._string("tensor name")
        (rank,) = self._unpack("<I", f"rank of tensor {name!r:.100}")
        if not 1 <= rank <= _MAX_DIMS:
            raise self._damaged(f"tensor {name!r:.100} has {rank} dimensions, allowed are 1 to {_MAX_DIMS}")
        dims = self._unpack(f"<{rank}Q", f"shape of tensor {name!r:.100}")
        type_number, offset = self._unpack("<IQ", f"type of tensor {name!r:.100}")
        if type_number not in TENSOR_TYPES:
            supported = ", ".join(type_name for type_name, _, _ in TENSOR_TYPES.values())
            type_name = _type_name(type_number)
            reasons = {"IQ": "entries of codebooks", "FP4": "floats of four bits"}
            reason = "".join(
                f", whose weights are {of}, no integer grid" for kind, of in reasons.items() if kind in type_name
            )
            raise ValueError(
                f"{self._path}: tensor {name!r:.100} has type {type_name}{reason}, supported are {supported}: "
                "convert the model to one of these, or download it again if it should be one"
            )
        type_name, block, block_bytes = TENSOR_TYPES[type_number]
        if min(dims) < 1 or dims[0] % block:
            raise self._damaged(f"tensor {name!r:.100} has shape {dims[::-1]}, impossible for type {type_name}")
        return GGUFTensor(name, dims[::-1], type_name, offset, dims[0] // block * block_bytes)

    def _key_value(self) -> None:
        key = self._string("metadata key")
        if key in self._values:
            raise self._damaged(f"metadata key {key!r:.100} occurs twice")
        (kind,) = self._unpack("<I", f"type of metadata key {key!r:.100}")
        if key == "general.alignment":
            self._alignment = self._values[key] = self._read_alignment(kind)
        else:
            self._values[key] = self._array(key) if kind == _ARRAY else self._value(kind, key)

    def _read_alignment(self, kind: int) -> int:
        if kind != _UINT32:
            raise self._damaged(f"general.alignment has value type {kind}, expected {_UINT32} (uint32)")
        (alignment,) = self._unpack("<I", "general.alignment")
        if alignment.bit_count() != 1:
            raise self._damaged(f"general.alignment is {alignment}, expected a power of two")
        return alignment

    def _array(self, key: str) -> list | UnreadArray:
        kind, count = self._unpack("<IQ", f"array of metadata key {key!r:.100}")
        is_kept = key in _ARRAYS or key.endswith(_PATTERN)
        if kind in _FIXED:
            self._check_count(count, _FIXED_SIZES[kind], f"values of metadata key {key!r:.100}")
            if is_kept:
                return np.frombuffer(self._take(count * _FIXED_SIZES[kind], key), f"<{_FIXED[kind]}").tolist()
            self._position += count * _FIXED_SIZES[kind]
        elif kind == _STRING:
            self._check_count(count, 8, f"strings of metadata key {key!r:.100}")
            if is_kept:
                return [self._string(key) for _ in range(count)]
            self._skip_strings(count, key)
        else:
            raise self._damaged(f"metadata key {key!r:.100} is an array of unknown value type {kind}")
        return UnreadArray()

    def _skip_strings(self, count: int, key: str) -> None:
        position, last = self._position, self._size - 8
        for _ in range(count):
            if position > last:
                self._position = min(position, self._size)
                self._take(8, f"{key!r:.100}")  # raises
            position += 8 + _LENGTH.unpack_from(self._data, position)[0]
        self._position = min(position, self._size)
        if position > self._size:
            self._take(1, f"{key!r:.100}")  # raises

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind not in _FIXED:
            raise self._damaged(f"metadata key {key!r:.100} has unknown value type {kind}")
        return self._unpack(f"<{_FIXED[kind]}", key)[0]

    def _string(self, item: str) -> str:
        (length,) = self._unpack("<Q", item)
        self._check_count(length, 1, f"bytes of {item}")
        try:
            return self._take(length, item).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(
                f"{item:.100} at byte {self._position - length:,} is not UTF-8 ({error.reason})"
            ) from error

    def _unpack(self, layout: str, item: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout), item))

    @property
    def _remaining(self) -> int:
        return self._size - self._position

    def _take(self, count: int, item: str) -> bytes:
        if count > self._remaining:
            raise self._damaged(f"it ends after {self._size:,} bytes, inside {item:.140} at byte {self._position:,}")
        self._position += count
        return self._data[self._position - count : self._position]

    def _check_count(self, count: int, min_bytes: int, item: str) -> None:
        if count * min_bytes > self._remaining:
            raise self._damaged(
                f"it announces {count:,} {item:.140} at byte {self._position:,}, but only {self._remaining:,} bytes "
                "follow"
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
