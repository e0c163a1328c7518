"""Reads the weights of a GGUF file, dequantized, a few rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bipolar_jax.extras import require
from bipolar_jax.models.loaders.gguf.header import GGUFTensor

_CHUNK_ELEMENTS = 1 << 19


class GGUFData:
    """The open file. A context manager."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._file = self._path.open("rb", buffering=0)

    def __enter__(self) -> GGUFData:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def rows(self, tensor: GGUFTensor, multiple: int = 1) -> Iterator[tuple[int, Float[np.ndarray, "rows columns"]]]:
        """float32 rows, exact for every supported type, in chunks, each with the index of its first row.

        A tensor of more than two dimensions is read as a matrix, one of one dimension as a single row.

        Args:
          tensor: the description.
          multiple: every chunk has a multiple of this number of rows, which must divide the tensor's.

        Raises:
          ValueError: the file ends before the tensor does.
        """
        quants, kinds = require("gguf.quants", "models"), require("gguf", "models").GGMLQuantizationType
        count, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        step = multiple * max(1, _CHUNK_ELEMENTS // (columns * multiple))
        for start in range(0, count, step):
            rows = min(step, count - start)
            size = rows * tensor.row_bytes
            raw = os.pread(self._file.fileno(), size, tensor.start + start * tensor.row_bytes)
            if len(raw) != size:
                raise ValueError(f"{self._path} ends inside tensor {tensor.name!r:.100}: download it again")
            stored = np.frombuffer(raw, np.uint8).reshape(rows, tensor.row_bytes)
            yield start, quants.dequantize(stored, kinds[tensor.type_name])
