"""Pretrained models from Hugging Face directories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from bipolar_jax.extras import require
from bipolar_jax.models.assemble import assemble, check_layout
from bipolar_jax.models.loaders.huggingface.architecture import Place
from bipolar_jax.models.loaders.huggingface.config import read_config
from bipolar_jax.models.loaders.naming import naming
from bipolar_jax.models.loaders.safetensors_files import SafetensorsFiles
from bipolar_jax.models.pretrained import PretrainedModel

if TYPE_CHECKING:
    import tokenizers


def load_huggingface(directory: str | os.PathLike[str], param_dtype: Any = jnp.float32) -> PretrainedModel:
    """Loads a Llama, Mistral, Qwen2, OPT or BLOOM model and its tokenizer, tensor by tensor.

    Args:
      directory: holds config.json, tokenizer.json and model.safetensors, or the
        shards that model.safetensors.index.json names. generation_config.json
        is read where it is there.
      param_dtype: dtype of the parameters.

    Raises:
      FileNotFoundError: the directory or one of its files is missing.
      ValueError: a file is damaged, contradicts another, or is of a kind we do not support.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}: give the folder of a Hugging Face model")
    architecture, config = read_config(directory)
    tokenizer = _read_tokenizer(directory / "tokenizer.json", config.vocab_size)
    with SafetensorsFiles(directory) as files:
        with naming(directory):
            # In the order of the parameters, so that each is complete before the next begins.
            places = sorted(place for name in files for place in architecture.places(name, config.tie_embeddings))
        shapes = {place.name: files.shape(place.name) for place in places}
        with naming(directory):
            check_layout(config, ((p.path, _layer(p), p.shape(shapes[p.name], config.num_heads)) for p in places))
            tensors = ((p.path, _layer(p), p.cut(files.read(p.name), config.num_heads)) for p in places)
            return PretrainedModel(assemble(config, tensors, param_dtype), tokenizer)


def _read_tokenizer(path: Path, vocab_size: int) -> tokenizers.Tokenizer:
    library = require("tokenizers", "models")
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: download it, or convert the slow tokenizer to it")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is damaged: {error}; download it again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{path} has token id {largest}, but config.json has {vocab_size=}, so the model has no embedding for it: "
            "use the tokenizer.json that belongs to these weights"
        )
    return tokenizer


def _layer(place: Place) -> int | None:
    return None if place.layer < 0 else place.layer
