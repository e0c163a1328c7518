"""The tensors of one model in one or several memory-mapped safetensors files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from bipolar_jax.extras import require
from bipolar_jax.models.loaders.huggingface.json_fields import read_json

_SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")


class SafetensorsFiles:
    """The tensors by name: shapes from the headers, values read on request. Iterates over the names.

    A context manager, which keeps the files mapped.
    """

    def __init__(self, directory: Path):
        """Opens the files.

        Raises:
          FileNotFoundError: no weights, or a missing shard.
          ValueError: a file is damaged, or lacks a tensor that the index names.
        """
        self._open = contextlib.ExitStack()
        self._file_of: dict[str, tuple[Path, Any]] = {}
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

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored. Raises ValueError for an unsupported dtype."""
        path, file = self._file_of[name]
        stored = file.get_slice(name)
        if stored.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {stored.get_dtype()}, supported are {', '.join(_DTYPES)}: "
                "load an unquantized model"
            )
        return tuple(stored.get_shape())

    def read(self, name: str) -> np.ndarray:
        """Values in the stored dtype and shape."""
        path, file = self._file_of[name]
        try:
            return file.get_tensor(name)
        except require("safetensors", "models").SafetensorError as error:
            raise _damaged(path, error) from error

    def _add(self, path: Path, names: list[str] | None) -> None:
        """Opens a file for the tensors `names`; None is all of its tensors."""
        library = require("safetensors", "models")
        if not path.is_file():
            raise FileNotFoundError(f"shard {path.name} of {path.parent / _INDEX} is missing: download it again")
        try:
            file = self._open.enter_context(library.safe_open(path, framework="np"))
        except (library.SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        stored = set(file.keys())
        missing = sorted(set(names or ()) - stored)
        if missing:
            raise ValueError(f"{path} lacks the tensor {missing[0]!r} that {_INDEX} places in it: download both again")
        self._file_of.update({name: (path, file) for name in (names or sorted(stored))})


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
        # Reject paths, which could point outside the directory.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ValueError(f"{index_path} places {name!r} in {file_name!r}, expected a file name: download it again")
        files.setdefault(directory / file_name, []).append(name)
    return files


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is a damaged or incomplete safetensors file: {error}; download it again")
