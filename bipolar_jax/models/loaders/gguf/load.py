"""Loads pretrained models from GGUF files, dequantized or with their own integers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from bipolar_jax.models.assemble import LazyTensor, assemble, check_layout, check_param_dtype
from bipolar_jax.models.chat import with_end_tokens
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.gguf.blocks import BLOCK_TYPES
from bipolar_jax.models.loaders.gguf.chat_template import read_chat_template
from bipolar_jax.models.loaders.gguf.config import Metadata, read_config
from bipolar_jax.models.loaders.gguf.data import GGUFData
from bipolar_jax.models.loaders.gguf.header import GGUFTensor, check_gguf
from bipolar_jax.models.loaders.gguf.tokenizer import build_tokenizer
from bipolar_jax.models.packed_kernels import PackedKind, PackedNumbers, PackedTensor, check_activations
from bipolar_jax.models.pretrained import PretrainedModel

# Tensor names in the file -> parameter paths of the Transformer.
_TOP = {
    "token_embd.weight": "embed/embedding",
    "output_norm.weight": "final_norm/scale",
    "output.weight": "lm_head/kernel",
}
_IN_LAYER = {
    "attn_norm.weight": "attention_norm/scale",
    "ffn_norm.weight": "ffn_norm/scale",
    "attn_output.weight": "attention/o_proj/kernel",
    "ffn_gate.weight": "ffn/gate_proj/kernel",
    "ffn_up.weight": "ffn/up_proj/kernel",
    "ffn_down.weight": "ffn/down_proj/kernel",
} | {
    f"attn_{projection}.{kind}": f"attention/{projection}_proj/{variable}"
    for projection in "qkv"
    for kind, variable in (("weight", "kernel"), ("bias", "bias"))
}
_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"
_MOST_ROPE_FACTORS = 1 << 16


def load_gguf(
    path: str | os.PathLike[str], param_dtype: Any = jnp.float32, activations: int | None = None
) -> PretrainedModel:
    """Loads a Llama or Qwen2 model and its tokenizer, tensor by tensor.

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
        factors = _rope_factors(data, stored.pop(_ROPE_FACTORS, None), path)
        config = read_config(metadata, set(stored), factors)
        tokenizer = build_tokenizer(metadata, config.vocab_size)
        config, template = with_end_tokens(config, tokenizer), read_chat_template(metadata)
        permuted = metadata.text("general.architecture") == "llama"
        # The metadata may hold millions of texts, which would stay beside the weights.
        del values, metadata
        # In the order of parameters, so that `assemble` completes one before it starts the next.
        targets = sorted((*_target(name, path), name) for name in stored)
        with errors_name(path):
            check_layout(config, ((target, _layer(layer), _our_shape(stored[name])) for target, layer, name in targets))
            found, kinds = [], {}
            for target, layer, name in targets:
                heads = _interleaved_heads(config, target, permuted)
                kind = None if activations is None else _packed_kind(stored[name], target, activations)
                if kind is None:
                    tensor = _lazy(data, stored[name], target, heads)
                else:
                    kinds[target, _layer(layer)] = kind
                    tensor = _packed(data, stored[name], kind, heads)
                found.append((target, _layer(layer), tensor))
            if activations is not None and not kinds:
                raise ValueError(f"it has no integers, so it takes no activations={activations}: use quantize_model")
            model = assemble(config, found, param_dtype, kinds)
    return PretrainedModel(model, tokenizer, template)


def _rope_factors(data: GGUFData, tensor: GGUFTensor | None, path: str | os.PathLike[str]) -> tuple[float, ...]:
    if tensor is None:
        return ()
    count = math.prod(tensor.shape)
    if count > _MOST_ROPE_FACTORS:
        raise ValueError(f"{path} has {count:,} RoPE factors, at most {_MOST_ROPE_FACTORS:,} are plausible")
    return tuple(float(factor) for _, rows in data.rows(tensor) for factor in rows.ravel())


def _target(name: str, path: str | os.PathLike[str]) -> tuple[str, int]:
    """The parameter path of a tensor, and its layer or -1 outside the layers."""
    if name in _TOP:
        return _TOP[name], -1
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        raise ValueError(f"{path} has an unexpected tensor {name!r:.100}: no supported architecture has one")
    return f"layers/{_IN_LAYER[match[2]]}", int(match[1])


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
