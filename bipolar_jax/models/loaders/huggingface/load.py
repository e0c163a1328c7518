"""Loads pretrained models from Hugging Face directories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from bipolar_jax.extras import require
from bipolar_jax.models.assemble import assemble, check_layout
from bipolar_jax.models.chat import with_end_tokens
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.huggingface.architecture import Target
from bipolar_jax.models.loaders.huggingface.chat_template import read_chat_template
from bipolar_jax.models.loaders.huggingface.config import read_config
from bipolar_jax.models.loaders.huggingface.safetensors_files import SafetensorsFiles
from bipolar_jax.models.pretrained import PretrainedModel

if TYPE_CHECKING:
    import tokenizers


def load_huggingface(directory: str | os.PathLike[str], param_dtype: Any = jnp.float32) -> PretrainedModel:
    """Loads a Llama, Mistral, Qwen2, OPT or BLOOM model and its tokenizer, tensor by tensor.

    Args:
      directory: folder with config.json, tokenizer.json, optionally generation_config.json, and
        model.safetensors or the shards that model.safetensors.index.json names.
      param_dtype: dtype of the parameters.

    Raises:
      FileNotFoundError: the directory or one of its files is missing.
      ValueError: a file is damaged, contradicts another, or is of an unsupported kind.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}: give the folder of a Hugging Face model")
    architecture, config = read_config(directory)
    tokenizer = _read_tokenizer(directory / "tokenizer.json", config.vocab_size)
    config, template = with_end_tokens(config, tokenizer), read_chat_template(directory)
    with SafetensorsFiles(directory) as files:
        with errors_name(directory):
            # In the order of parameters, so that `assemble` completes one before it starts the next.
            targets = sorted(target for name in files for target in architecture.targets(name, config.tie_embeddings))
        shapes = {target.name: files.shape(target.name) for target in targets}
        with errors_name(directory):
            check_layout(config, ((t.path, _layer(t), t.shape(shapes[t.name], config.num_heads)) for t in targets))
            tensors = ((t.path, _layer(t), t.extract(files.read(t.name), config.num_heads)) for t in targets)
            return PretrainedModel(assemble(config, tensors, param_dtype), tokenizer, template)


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


def _layer(target: Target) -> int | None:
    return None if target.layer < 0 else target.layer
