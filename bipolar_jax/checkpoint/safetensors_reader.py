"""Reads safetensors files into memory that JAX uses as it is, so that a tensor is in memory once.

The safetensors library maps the file and copies each tensor out of the mapping, and JAX copies again. A mapped file
also hides errors of the disk until a page is touched, as a signal that ends the process.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from bipolar_jax.checkpoint.json_text import parse_json
from bipolar_jax.packing.host_memory import aligned_empty

# dtypes that the loaders read; a file may hold others, which have a name and no numpy dtype.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MOST_NAME_CHARACTERS = 1024
_MOST_HEADER_BYTES = 100_000_000  # as in the safetensors library
_MOST_DIMS = 64  # numpy's limit
_MOST_ELEMENTS = 2**48


class SafetensorsError(ValueError):
    """Damage of a file; the message does not name it."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """The description of a tensor whose data lies within the file.

    Attributes:
      dtype: name in the file, such as "F32".
      shape: shape.
      start: offset of the data in the file, in bytes.
      nbytes: size of the data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsReader:
    """An open safetensors file. A context manager.

    Attributes:
      metadata: the texts of the header's "__metadata__".
      tensors: descriptions by name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file and checks its header.

        Raises:
          OSError: the file is missing or not readable.
          SafetensorsError: the header is damaged, or does not describe the rest of the file byte by byte.
        """
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            header, data_start, size = self._header()
            self.metadata = _metadata(header.pop("__metadata__", {}))
            self.tensors = {name: _tensor(name, header[name], data_start) for name in header}
            self._check_order(data_start, size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def read(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """A tensor in new, aligned memory. Raises KeyError, or SafetensorsError for an unknown dtype."""
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise SafetensorsError(f"tensor {name!r:.100} has the unknown dtype {stored.dtype!r:.20}")
        array = aligned_empty(stored.shape, DTYPES[stored.dtype])
        self.read_bytes(stored.start, array)
        return array

    def read_bytes(self, start: int, target: Shaped[np.ndarray, "..."]) -> None:
        """Fills a contiguous array from the file's bytes at `start`. Raises SafetensorsError if the file is shorter."""
        view = memoryview(target.reshape(-1).view(np.uint8))
        while view:
            count = os.preadv(self._file.fileno(), [view[: 1 << 30]], start)
            if not count:
                raise SafetensorsError(f"it ends at byte {start:,}, inside a tensor")
            view, start = view[count:], start + count

    def _header(self) -> tuple[dict[str, Any], int, int]:
        """The header, the offset of the data, and the file's size."""
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise SafetensorsError(f"it has {size} bytes, fewer than its header's length takes")
        (length,) = struct.unpack("<Q", _exactly(self._file, 8))
        if length > min(_MOST_HEADER_BYTES, size - 8):
            raise SafetensorsError(f"it announces a header of {length:,} bytes, but has {size:,} bytes")
        try:
            header = parse_json(_exactly(self._file, length).decode())
        except ValueError as error:
            raise SafetensorsError(f"its header is not JSON ({error!s:.200})") from error
        if not isinstance(header, dict):
            raise SafetensorsError(f"its header is a {type(header).__name__}, not an object")
        return header, 8 + length, size

    def _check_order(self, data_start: int, size: int) -> None:
        """The tensors' data follow each other without holes up to the end of the file."""
        position = data_start
        for name, stored in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if stored.start != position:
                raise SafetensorsError(
                    f"tensor {name!r:.100} starts at byte {stored.start:,}, expected byte {position:,}"
                )
            position += stored.nbytes
        if position != size:
            raise SafetensorsError(f"its tensors end at byte {position:,}, but it has {size:,} bytes")


def _exactly(file: Any, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise SafetensorsError(f"it ends after {len(data):,} of {count:,} bytes")
    return data


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise SafetensorsError("its __metadata__ is not an object of texts")
    return value


def _tensor(name: str, value: Any, data_start: int) -> StoredTensor:
    if len(name) > MOST_NAME_CHARACTERS:
        raise SafetensorsError(f"it has a tensor name of {len(name):,} characters")
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or len(dtype) > 20 or not _are_sizes(shape, _MOST_DIMS) or not _are_sizes(offsets, 2):
        raise SafetensorsError(f"tensor {name!r:.100} has a damaged description")
    nbytes = offsets[1] - offsets[0] if len(offsets) == 2 else -1
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else nbytes
    if nbytes < 0 or nbytes != expected:
        raise SafetensorsError(f"tensor {name!r:.100} has shape {shape} and offsets {offsets}, which disagree")
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(size) is int and 0 <= size <= _MOST_ELEMENTS for size in value)
    )
