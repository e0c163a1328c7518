"""Readers of pretrained checkpoints, whatever their form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from bipolar_jax.models.checkpoint import load_model
from bipolar_jax.models.loaders.gguf.load import load_gguf
from bipolar_jax.models.loaders.huggingface.load import load_huggingface
from bipolar_jax.models.pretrained import PretrainedModel

__all__ = ["PretrainedModel", "load_gguf", "load_huggingface", "load_pretrained"]

_WHAT_TO_GIVE = "a .gguf file, a Hugging Face directory with config.json, or a packed .safetensors checkpoint"


def load_pretrained(
    path: str | os.PathLike[str], param_dtype: Any = jnp.float32, bits: int | None = None
) -> PretrainedModel:
    """Loads a checkpoint by what is at `path`.

    That may be a .gguf file, a Hugging Face directory, or a .safetensors file that
    `save_model` wrote, which keeps the dtypes it was saved with.

    Args:
      path: the file or directory.
      param_dtype: dtype of the parameters that GGUF and Hugging Face give.
      bits: weight bits to read of a packed checkpoint at most, see `load_model`.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is none of these, or the loader it belongs to refuses it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: give {_WHAT_TO_GIVE}")
    if bits is not None and path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is not packed, it cannot be read at {bits} bits: use quantize_model")
    if path.is_dir() and (path / "config.json").is_file():
        return load_huggingface(path, param_dtype)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return load_gguf(path, param_dtype)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        return load_model(path, bits)
    what = "a directory without config.json" if path.is_dir() else f"a file named *{path.suffix}"
    raise ValueError(f"{path} is {what}: give {_WHAT_TO_GIVE}")
