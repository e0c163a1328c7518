"""Loaders of pretrained models: GGUF files, Hugging Face directories, names on its Hub, packed checkpoints."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp

from bipolar_jax.models.checkpoint import load_model
from bipolar_jax.models.loaders.gguf.load import load_gguf
from bipolar_jax.models.loaders.hub import local_path
from bipolar_jax.models.loaders.huggingface.load import load_huggingface
from bipolar_jax.models.pretrained import PretrainedModel

__all__ = ["PretrainedModel", "load_gguf", "load_huggingface", "load_pretrained"]

_SUPPORTED = (
    "a .gguf file, a Hugging Face directory with config.json, a packed .safetensors checkpoint, or a name on the "
    "Hugging Face Hub, OWNER/NAME or OWNER/NAME/FILE"
)


def load_pretrained(
    path: str | os.PathLike[str],
    param_dtype: Any = None,
    bits: int | None = None,
    activations: int | None = None,
    *,
    revision: str | None = None,
) -> PretrainedModel:
    """Loads a .gguf file, a Hugging Face directory, or a .safetensors file written by `save_model`.

    Args:
      path: the file or directory. Where there is none, a name on the Hugging Face Hub such as
        "HuggingFaceTB/SmolLM2-135M-Instruct", whose files are downloaded into huggingface_hub's cache, and found there
        without a network; or "OWNER/NAME/FILE.gguf", or a packed checkpoint there.
      param_dtype: dtype of the float parameters and of the computation; None is that of a packed checkpoint, and
        float32 for other files.
      bits: most weight bits to read from a packed checkpoint, see `load_model`.
      activations: bits of the activations of a quantized Hugging Face directory, see `load_huggingface`. Of a GGUF
        file, whose integers then stay as they are; None dequantizes it, see `load_gguf`.
      revision: of a name on the Hub: branch, tag or commit; None is the main branch.

    Raises:
      FileNotFoundError: nothing at `path`, nor on the Hub or in its cache.
      PermissionError, ConnectionError: see `hub.local_path`.
      ValueError: another kind of file, or its loader rejects it.
    """
    path = local_path(path, revision)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: give {_SUPPORTED}")
    if bits is not None and path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{path} is not packed, so it cannot be read at {bits} bits: load it without bits, then use quantize_model"
        )
    is_directory = path.is_dir() and (path / "config.json").is_file()
    if activations is not None and not is_directory and path.suffix.lower() != ".gguf":
        raise ValueError(
            f"{path} is no GGUF file or Hugging Face directory, so it takes no activations: leave them None"
        )
    if path.is_file() and path.suffix.lower() == ".safetensors":
        return load_model(path, bits, param_dtype)
    param_dtype = jnp.float32 if param_dtype is None else param_dtype
    if is_directory:
        return load_huggingface(path, param_dtype, activations)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return load_gguf(path, param_dtype, activations)
    kind = "a directory without config.json" if path.is_dir() else f"a file named *{path.suffix}"
    raise ValueError(f"{path} is {kind}: give {_SUPPORTED}")
