"""Loads pretrained models from GGUF files, dequantized or with their own integers."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from bipolar_jax.models.assemble import LazyTensor, assemble, check_layout, check_param_dtype
from bipolar_jax.models.chat import with_end_tokens
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.gguf.architectures import PERMUTED, targets
from bipolar_jax.models.loaders.gguf.blocks import BLOCK_TYPES
from bipolar_jax.models.loaders.gguf.chat_template import read_chat_template
from bipolar_jax.models.loaders.gguf.config import ROPE_TENSORS, read_config
from bipolar_jax.models.loaders.gguf.data import GGUFData
from bipolar_jax.models.loaders.gguf.header import GGUFTensor, check_gguf
from bipolar_jax.models.loaders.gguf.metadata import Metadata
from bipolar_jax.models.loaders.gguf.tokenizer import build_tokenizer
from bipolar_jax.models.packed_kernels import (
    PackedKind,
    PackedNumbers,
    PackedTensor,
    check_activations,
    parameter_order,
)
from bipolar_jax.models.pretrained import PretrainedModel

_MOST_ROPE_FACTORS = 1 << 16


def load_gguf(
    path: str | os.PathLike[str], param_dtype: Any = jnp.float32, activations: int | None = None
) -> PretrainedModel:
    """Loads a model of an architecture in `architectures.ARCHITECTURES` and its tokenizer, tensor by tensor.

    The header is validated, and the tensors' shapes are compared with the metadata, before any weight is read.

    Args:
      path: a file whose tensors have types of `header.TENSOR_TYPES`.
      param_dtype: dtype of the float parameters; only float32 represents dequantized types exactly.
      activations: None dequantizes. Else matrices of integers become packed layers of the same integers and scales
        (`BlockScaledArray`), which round their activations to so many bits, 1 to 8, or take float ones (16). The
        embedding and the output layer are packed as they are stored, and take float activations.

    Raises:
      FileNotFoundError: no file at `path`.
      PermissionError: the file is not readable.
      ValueError: the file is damaged, truncated, contradicts itself, or is of an unsupported kind; a param_dtype
        other than float32, bfloat16 and float16; activations of other bits, or of a file without integers.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    param_dtype = check_param_dtype(param_dtype)
    check_activations(activations)
    values, tensors = check_gguf(path)
    metadata = Metadata(values, str(path))
    stored = {tensor.name: tensor for tensor in tensors}
    with GGUFData(path) as data:
        factors = {name: _rope_factors(data, stored.pop(name), path) for name in ROPE_TENSORS if name in stored}
        config = read_config(metadata, set(stored), factors)
        tokenizer = build_tokenizer(metadata, config.vocab_size)
        config, template = with_end_tokens(config, tokenizer), read_chat_template(metadata)
        arch = metadata.text("general.architecture")
        # The metadata may hold millions of texts, which would stay beside the weights.
        del values, metadata
        named = [(tensor, *targets(name, arch, str(path))) for name, tensor in stored.items()]
        with errors_name(path):
            parts = [part for tensor, paths, layer in named for part in _parts(config, tensor, paths, layer)]
            parts.sort(key=lambda part: parameter_order(*part[:2]))
            check_layout(config, ((target, _layer(layer), _our_shape(part)) for target, layer, part in parts))
            found, kinds = [], {}
            for target, layer, part in parts:
                heads = _interleaved_heads(config, target, arch in PERMUTED)
                kind = None if activations is None else _packed_kind(part, target, activations)
                if kind is None:
                    tensor = _lazy(data, part, target, heads)
                else:
                    kinds[target, _layer(layer)] = kind
                    tensor = _packed(data, part, kind, heads)
                found.append((target, _layer(layer), tensor))
            if activations is not None and not kinds:
                raise ValueError(f"it has no integers, so it takes no activations={activations}: use quantize_model")
            model = assemble(config, found, param_dtype, kinds)
    return PretrainedModel(model, tokenizer, template)


def _rope_factors(data: GGUFData, tensor: GGUFTensor, path: str | os.PathLike[str]) -> tuple[float, ...]:
    count = math.prod(tensor.shape)
    if count > _MOST_ROPE_FACTORS:
        raise ValueError(f"{path} has {count:,} RoPE factors, at most {_MOST_ROPE_FACTORS:,} are plausible")
    return tuple(float(factor) for _, rows in data.rows(tensor) for factor in rows.ravel())


def _parts(
    config: TransformerConfig, tensor: GGUFTensor, paths: tuple[str, ...], layer: int
) -> Iterator[tuple[str, int, GGUFTensor]]:
    """The parameter, the layer and the rows of each part of a tensor; parts lie one after the other.

    Raises:
      ValueError: another number of rows than the parts have together.
    """
    if "*" in paths[0]:
        yield from _experts(config, tensor, paths[0], layer)
        return
    if len(paths) == 1:
        yield paths[0], layer, tensor
        return
    sizes = [config.outputs(path.split("/")[-2]) for path in paths]
    if len(tensor.shape) != 2 or tensor.shape[0] != sum(sizes):
        raise ValueError(
            f"tensor {tensor.name!r:.100} has shape {tensor.shape}, its rows are not the {sizes} of its parts: the "
            "metadata and the weights disagree"
        )
    first = 0
    for path, size in zip(paths, sizes, strict=True):
        start = tensor.start + first * tensor.row_bytes
        yield path, layer, dataclasses.replace(tensor, shape=(size, *tensor.shape[1:]), start=start)
        first += size


def _experts(
    config: TransformerConfig, tensor: GGUFTensor, path: str, layer: int
) -> Iterator[tuple[str, int, GGUFTensor]]:
    """The parameters of all experts of a layer, which lie one after the other. Raises ValueError for other numbers."""
    count = 0 if config.experts is None else config.experts.count
    if len(tensor.shape) != 3 or tensor.shape[0] != count:
        raise ValueError(
            f"tensor {tensor.name!r:.100} has shape {tensor.shape}, not those of {count} experts: the metadata and the "
            "weights disagree"
        )
    for expert in range(count):
        start = tensor.start + expert * tensor.shape[1] * tensor.row_bytes
        yield path.replace("*", str(expert)), layer, dataclasses.replace(tensor, shape=tensor.shape[1:], start=start)


def _layer(layer: int) -> int | None:
    return None if layer < 0 else layer


def _our_shape(tensor: GGUFTensor) -> tuple[int, ...]:
    """Shape in the parameter's orientation: kernels are stored as [out, in], ours are [in, out]."""
    return tensor.shape if tensor.name == "token_embd.weight" else tensor.shape[::-1]


def _interleaved_heads(config: TransformerConfig, target: str, permuted: bool) -> int:
    """Number of heads whose rows have llama.cpp's order; 0 if none. `permuted` says that the file's q and k have it."""
    if permuted and "attention/q_proj/" in target:
        return config.num_heads
    return config.num_kv_heads if permuted and "attention/k_proj/" in target else 0


def _lazy(data: GGUFData, tensor: GGUFTensor, target: str, heads: int) -> LazyTensor:
    """The tensor for `assemble`; rows of `heads` heads are put into our order."""
    is_vector = len(tensor.shape) == 1
    rows_of_head = tensor.shape[0] // heads if heads and not is_vector else 1

    def copy_to(parameter: np.ndarray) -> None:
        view = parameter.T if target.endswith("/kernel") else parameter
        for start, rows in data.rows(tensor, rows_of_head):
            if is_vector:
                view[...] = _unpermute(rows[0], heads) if heads else rows[0]
            else:
                view[start : start + len(rows)] = _unpermute(rows, len(rows) // rows_of_head) if heads else rows

    return LazyTensor(_our_shape(tensor), copy_to)


def _packed_kind(tensor: GGUFTensor, target: str, activations: int) -> PackedKind | None:
    """How a tensor's integers are packed; None for one that becomes floats, such as a norm."""
    is_table = target == "embed/embedding"
    if target.endswith("/router/kernel"):
        return None  # a router stays float
    if tensor.type_name not in BLOCK_TYPES or len(tensor.shape) != 2 or not (is_table or target.endswith("/kernel")):
        return None
    is_float = activations == 16 or not target.startswith("layers/")
    return BLOCK_TYPES[tensor.type_name].kind(None if is_float else activations, -1 if is_table else -2)


def _packed(data: GGUFData, tensor: GGUFTensor, kind: PackedKind, heads: int) -> PackedTensor:
    """The tensor's integers for `assemble`; rows of `heads` heads are put into our order."""
    rows_of_head = tensor.shape[0] // heads if heads else 1
    block_type = BLOCK_TYPES[tensor.type_name]

    def read() -> Iterator[PackedNumbers]:
        for _, rows in data.stored_rows(tensor, rows_of_head):
            ours = _unpermute(rows, len(rows) // rows_of_head) if heads else rows
            yield block_type.numbers(ours, tensor.shape[1])

    return PackedTensor(_our_shape(tensor), kind, read)


def _unpermute(rows: Shaped[np.ndarray, "out ..."], heads: int) -> Shaped[np.ndarray, "out ..."]:
    """Restores the row order that llama.cpp's converter changes.

    llama.cpp rotates pairs (2i, 2i + 1) of a head where we rotate (i, i + head_dim // 2), so its
    converter interleaves the two halves of each head's rows in q and k.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
