"""The tensors of one model in one or several safetensors files."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from bipolar_jax.checkpoint.safetensors_reader import DTYPES, SafetensorsError, SafetensorsReader, StoredTensor
from bipolar_jax.extras import require
from bipolar_jax.models.loaders.huggingface.json_fields import read_json

_SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_CHUNK_BYTES = 4 << 20
# No folders, which could lead outside the directory, and nothing that a file system cannot hold.
_FILE_NAME = re.compile(r"[^/\\\x00-\x1f\ud800-\udfff]{1,200}")


class SafetensorsFiles:
    """The tensors by name: shapes from the headers, values read on request. Iterates over the names.

    A context manager, which keeps the files open.
    """

    def __init__(self, directory: Path):
        """Opens the files.

        Raises:
          FileNotFoundError: no weights, or a missing shard.
          ValueError: a file is damaged, or lacks a tensor that the index names.
        """
        require("safetensors", "models")  # a missing extra is named before a file is read
        self._open = contextlib.ExitStack()
        self._file_of: dict[str, tuple[Path, SafetensorsReader]] = {}
        try:
            for path, names in _files(directory).items():
                self._add(path, names)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(self, *exception) -> None:
        self._open.close()

    def __iter__(self):
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def stored(self, name: str) -> StoredTensor:
        """The description of a tensor of any dtype."""
        return self._file_of[name][1].tensors[name]

    def read(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """A tensor of any known dtype, whole. Raises ValueError for an unknown one, or if the file is truncated."""
        path, file = self._file_of[name]
        try:
            return file.read(name)
        except SafetensorsError as error:
            raise _damaged(path, error) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored. Raises ValueError for an unsupported dtype."""
        path, file = self._file_of[name]
        stored = file.tensors[name]
        if stored.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r:.200} has dtype {stored.dtype:.20}, supported are {', '.join(_DTYPES)}: "
                "load an unquantized model"
            )
        return stored.shape

    def rows(
        self, name: str, start: int, end: int, merged_axes: int = 1
    ) -> Iterator[tuple[int, Shaped[np.ndarray, "rows ..."]]]:
        """Rows start ... end - 1 of a tensor, a few megabytes at a time, each chunk with its offset from `start`.

        Rows are counted over the first `merged_axes` axes. A chunk is valid until the next one is read.
        """
        path, file = self._file_of[name]
        stored = file.tensors[name]
        dtype, row_shape = DTYPES[stored.dtype], stored.shape[merged_axes:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        step = max(1, min(_CHUNK_BYTES // max(row_bytes, 1), end - start))
        chunk = np.empty((step, *row_shape), dtype)
        for offset in range(0, end - start, step):
            rows = chunk[: min(step, end - start - offset)]
            try:
                file.read_bytes(stored.start + (start + offset) * row_bytes, rows)
            except SafetensorsError as error:
                raise _damaged(path, error) from error
            yield offset, rows

    def _add(self, path: Path, names: list[str] | None) -> None:
        """Opens a file for the tensors `names`; None is all of its tensors."""
        if not path.is_file():
            raise FileNotFoundError(f"shard {path.name} of {path.parent / _INDEX} is missing: download it again")
        try:
            file = self._open.enter_context(SafetensorsReader(path))
        except SafetensorsError as error:
            raise _damaged(path, error) from error
        missing = sorted(set(names or ()) - set(file.tensors))
        if missing:
            raise ValueError(
                f"{path} lacks the tensor {missing[0]!r:.200} that {_INDEX} places in it: download both again"
            )
        self._file_of.update({name: (path, file) for name in (names or sorted(file.tensors))})


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """Files to open -> names of the tensors to read from each; None is all of them."""
    if (directory / _SINGLE_FILE).is_file():
        return {directory / _SINGLE_FILE: None}
    index_path = directory / _INDEX
    if not index_path.is_file():
        raise FileNotFoundError(
            f"neither {_SINGLE_FILE} nor {_INDEX} in {directory}: download the weights in the safetensors format"
        )
    file_names = read_json(index_path).get("weight_map")
    if not isinstance(file_names, dict) or not file_names:
        raise ValueError(f"{index_path} has no weight_map: download it again")
    files: dict[Path, list[str] | None] = {}
    for name, file_name in file_names.items():
        if not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
            raise ValueError(
                f"{index_path} places {name!r:.100} in {file_name!r:.100}, expected a file name: download it again"
            )
        files.setdefault(directory / file_name, []).append(name)
    return files


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is a damaged or incomplete safetensors file: {error}; download it again")
