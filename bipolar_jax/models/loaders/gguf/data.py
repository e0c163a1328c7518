"""Reads the weights of a GGUF file a few rows at a time, dequantized or as stored."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from bipolar_jax.extras import require
from bipolar_jax.models.loaders.gguf.blocks import BLOCK_TYPES
from bipolar_jax.models.loaders.gguf.header import GGUFTensor

_CHUNK_ELEMENTS = 1 << 19
# Types that gguf-py names, or not yet, but does not dequantize.
_WITHOUT_READER = ("Q1_0", "Q2_0")


class GGUFData:
    """The open file. A context manager."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._file = self._path.open("rb", buffering=0)

    def __enter__(self) -> GGUFData:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def stored_rows(
        self, tensor: GGUFTensor, multiple: int = 1
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "rows bytes"]]]:
        """As `rows`, but the bytes of the file."""
        count, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        step = multiple * max(1, _CHUNK_ELEMENTS // (columns * multiple))
        for start in range(0, count, step):
            rows = min(step, count - start)
            size = rows * tensor.row_bytes
            raw = os.pread(self._file.fileno(), size, tensor.start + start * tensor.row_bytes)
            if len(raw) != size:
                raise ValueError(f"{self._path} ends inside tensor {tensor.name!r:.100}: download it again")
            yield start, np.frombuffer(raw, np.uint8).reshape(rows, tensor.row_bytes)

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
        for start, stored in self.stored_rows(tensor, multiple):
            if tensor.type_name in _WITHOUT_READER:
                yield start, BLOCK_TYPES[tensor.type_name].dequantize(stored, tensor.shape[-1])
            else:
                with np.errstate(invalid="ignore", over="ignore"):  # `assemble` reports numbers that are not finite
                    yield start, quants.dequantize(stored, kinds[tensor.type_name])
