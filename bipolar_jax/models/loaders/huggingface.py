"""Pretrained models from Hugging Face directories."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from bipolar_jax.extras import require
from bipolar_jax.models.assemble import assemble, check_layout
from bipolar_jax.models.loaders.huggingface_config import read_config
from bipolar_jax.models.loaders.naming import naming
from bipolar_jax.models.loaders.safetensors_files import SafetensorsFiles
from bipolar_jax.models.pretrained import PretrainedModel

if TYPE_CHECKING:
    import tokenizers

# Tensor names in the file -> module paths of the Transformer.
_TOP = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.norm.weight": "final_norm/scale",
    "lm_head.weight": "lm_head/kernel",
}
_IN_LAYER = (
    {
        "input_layernorm.weight": "attention_norm/scale",
        "post_attention_layernorm.weight": "ffn_norm/scale",
        "self_attn.o_proj.weight": "attention/o_proj/kernel",
    }
    | {f"self_attn.{name}_proj.weight": f"attention/{name}_proj/kernel" for name in "qkv"}
    | {f"self_attn.{name}_proj.bias": f"attention/{name}_proj/bias" for name in "qkv"}
    | {f"mlp.{name}_proj.weight": f"ffn/{name}_proj/kernel" for name in ("gate", "up", "down")}
)
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")
# Frequencies that old checkpoints stored; they follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def load_huggingface(directory: str | os.PathLike[str], param_dtype: Any = jnp.float32) -> PretrainedModel:
    """Loads a Llama, Mistral or Qwen2 model and its tokenizer, tensor by tensor.

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
    config = read_config(directory)
    tokenizer = _read_tokenizer(directory / "tokenizer.json", config.vocab_size)
    with SafetensorsFiles(directory) as files:
        # In the order of the parameters, so that each is complete before the next begins.
        places = sorted(
            (*_place(name, directory), name) for name in files if not _is_ignored(name, config.tie_embeddings)
        )
        layout = [(where, _layer(layer), _our_shape(name, files.shape(name))) for where, layer, name in places]
        with naming(directory):
            check_layout(config, layout)
            return PretrainedModel(assemble(config, _read(files, places), param_dtype), tokenizer)


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


def _is_ignored(name: str, tied: bool) -> bool:
    """Tensors that say nothing new: stored frequencies, and a copy of tied embeddings."""
    return name.endswith(_IGNORED_SUFFIX) or (tied and name == "lm_head.weight")


def _place(name: str, directory: Path) -> tuple[str, int]:
    """Module path of a tensor and its layer, -1 outside the layers."""
    if name in _TOP:
        return _TOP[name], -1
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        raise ValueError(f"{directory} has an unexpected tensor {name!r}: no supported model has one")
    return f"layers/{_IN_LAYER[match[2]]}", int(match[1])


def _layer(layer: int) -> int | None:
    return None if layer < 0 else layer


def _our_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Kernels are stored [out, in], ours are [in, out]; embeddings stay."""
    return shape if name == "model.embed_tokens.weight" else shape[::-1]


def _read(files: SafetensorsFiles, places: list[tuple[str, int, str]]) -> Iterator[tuple[str, int | None, np.ndarray]]:
    for where, layer, name in places:
        array = files.read(name)
        yield where, _layer(layer), array.T if where.endswith("/kernel") else array
