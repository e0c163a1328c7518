"""Loads pretrained models from Hugging Face directories."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bipolar_jax.models.assemble import LazyTensor, assemble, check_layout, check_param_dtype
from bipolar_jax.models.chat import with_end_tokens
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.huggingface.architecture import HEAD, Architecture, Target
from bipolar_jax.models.loaders.huggingface.chat_template import read_chat_template
from bipolar_jax.models.loaders.huggingface.config import read_config
from bipolar_jax.models.loaders.huggingface.quantized.method import read_format, read_transforms
from bipolar_jax.models.loaders.huggingface.quantized.module import QuantizedFormat
from bipolar_jax.models.loaders.huggingface.quantized.tensors import packed_tensors
from bipolar_jax.models.loaders.huggingface.safetensors_files import SafetensorsFiles
from bipolar_jax.models.packed_kernels import parameter_order
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import load_tokenizer


def load_huggingface(
    directory: str | os.PathLike[str], param_dtype: Any = jnp.float32, activations: int | None = None
) -> PretrainedModel:
    """Loads a model of an architecture in `config.ARCHITECTURES` and its tokenizer, tensor by tensor.

    Layers that the directory has quantized by GPTQ, AWQ, compressed-tensors, BitNet or bitsandbytes' 8 bits become
    packed layers of the same integers, scales and zeros; all others stay as they are stored.

    Args:
      directory: folder with config.json, tokenizer.json, optionally generation_config.json, and
        model.safetensors or the shards that model.safetensors.index.json names.
      param_dtype: dtype of the float parameters and of the computation: float32, bfloat16 or float16.
      activations: bits of the activations of quantized layers, 1 to 8, or 16 for float ones; None takes what the
        directory states, and 16 where it states nothing.

    Raises:
      FileNotFoundError: the directory or one of its files is missing.
      PermissionError: a file is not readable.
      ValueError: a file is damaged, contradicts another, or is of an unsupported kind; another param_dtype;
        activations of other bits, or of a directory that is not quantized.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    directory, param_dtype = Path(directory), check_param_dtype(param_dtype)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}: give the folder of a Hugging Face model")
    architecture, config = read_config(directory)
    quantized_format, transforms = read_format(directory, activations), read_transforms(directory)
    tokenizer = load_tokenizer(directory / "tokenizer.json", config.vocab_size)
    config, template = with_end_tokens(config, tokenizer), read_chat_template(directory)
    with SafetensorsFiles(directory) as files, errors_name(directory):
        if config.tie_embeddings and _has_own_head(architecture, files, quantized_format):
            config = dataclasses.replace(config, tie_embeddings=False)
        config = transforms.applied(config, architecture, files)
        packed, names = {}, list(files)
        if quantized_format is not None:
            packed, names = packed_tensors(architecture, config, files, quantized_format)
        found = [(*key, tensor) for key, tensor in packed.items()]
        names = [name for name in names if not transforms.stores(name)]
        of_name = functools.partial(
            architecture.targets,
            tied=config.tie_embeddings,
            num_experts=0 if config.experts is None else config.experts.count,
        )
        for target in (target for name in names for target in of_name(name)):
            found.append((target.path, _layer(target), _lazy(files, target, config)))
        found.sort(key=lambda entry: parameter_order(*entry[:2]))
        check_layout(config, ((path, layer, tensor.shape) for path, layer, tensor in found))
        kinds = {key: tensor.kind for key, tensor in packed.items()}
        return PretrainedModel(assemble(config, found, param_dtype, kinds), tokenizer, template)


def _has_own_head(architecture: Architecture, files: SafetensorsFiles, quantized: QuantizedFormat | None) -> bool:
    """Whether an output layer is stored that differs from the embedding; transformers uses it, tied or not."""
    if quantized is not None and f"{HEAD.removesuffix('weight')}{quantized.marker}" in files:
        return True
    weights = (name for name in files if name.endswith(".weight"))
    embeddings = [
        name for name in weights for target in architecture.targets(name, tied=True) if target.path == "embed/embedding"
    ]
    if HEAD not in files or len(embeddings) != 1:
        return False
    shape = files.shape(HEAD)
    if shape != files.shape(embeddings[0]):
        return True
    return not all(
        np.array_equal(head.astype(np.float32), embedding.astype(np.float32))
        for (_, head), (_, embedding) in zip(
            *(files.rows(name, 0, shape[0] if shape else 0) for name in (HEAD, embeddings[0])), strict=True
        )
    )


def _lazy(files: SafetensorsFiles, target: Target, config: TransformerConfig) -> LazyTensor:
    stored = files.shape(target.name)

    def copy_to(parameter: np.ndarray) -> None:
        view, is_stack = target.as_stored(parameter), target.expert >= 0
        for start, end, ours in target.row_ranges(stored[is_stack], config):
            for offset, rows in files.rows(target.name, start, end, merged_axes=1 + is_stack):
                if target.plus_one:  # rounded once, to the parameter's dtype
                    rows = rows.astype(np.float32) + 1
                view[ours + offset : ours + offset + len(rows)] = rows

    return LazyTensor(target.shape(stored, config), copy_to)


def _layer(target: Target) -> int | None:
    return None if target.layer < 0 else target.layer
