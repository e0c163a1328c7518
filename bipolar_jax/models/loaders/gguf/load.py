"""Loads pretrained models from GGUF files, dequantized."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bipolar_jax.extras import require
from bipolar_jax.models.assemble import assemble, check_layout
from bipolar_jax.models.chat import with_end_tokens
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.gguf.chat_template import read_chat_template
from bipolar_jax.models.loaders.gguf.config import Metadata, read_config
from bipolar_jax.models.loaders.gguf.header import GGUFTensor, check_gguf
from bipolar_jax.models.loaders.gguf.tokenizer import build_tokenizer
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


def load_gguf(path: str | os.PathLike[str], param_dtype: Any = jnp.float32) -> PretrainedModel:
    """Loads a Llama or Qwen2 model and its tokenizer, tensor by tensor.

    The header is validated, and the tensors' shapes are compared with the metadata, before any weight is read.

    Args:
      path: a file whose tensors are F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
      param_dtype: dtype of the parameters; only float32 represents the quantized types exactly.

    Raises:
      FileNotFoundError: no file at `path`.
      ValueError: the file is damaged, truncated, contradicts itself, or is of an unsupported kind.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    descriptions = {tensor.name: tensor for tensor in check_gguf(path)}
    reader = require("gguf", "models").GGUFReader(path)
    metadata = Metadata({key: field.contents() for key, field in reader.fields.items()}, str(path))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    factors = ()
    if _ROPE_FACTORS in stored:
        factors = tuple(_dequantize(stored.pop(_ROPE_FACTORS)).ravel().tolist())
        del descriptions[_ROPE_FACTORS]
    config = read_config(metadata, set(stored), factors)
    tokenizer = build_tokenizer(metadata, config.vocab_size)
    config, template = with_end_tokens(config, tokenizer), read_chat_template(metadata)
    # In the order of parameters, so that `assemble` completes one before it starts the next.
    targets = sorted((*_target(name, path), name) for name in stored)
    with errors_name(path):
        layout = ((target, _layer(layer), _our_shape(descriptions[name])) for target, layer, name in targets)
        check_layout(config, layout)
        permuted = metadata.text("general.architecture") == "llama"
        model = assemble(config, _read(config, stored, targets, permuted), param_dtype)
    return PretrainedModel(model, tokenizer, template)


def _target(name: str, path: str | os.PathLike[str]) -> tuple[str, int]:
    """The parameter path of a tensor, and its layer or -1 outside the layers."""
    if name in _TOP:
        return _TOP[name], -1
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        raise ValueError(f"{path} has an unexpected tensor {name!r}: no supported architecture has one")
    return f"layers/{_IN_LAYER[match[2]]}", int(match[1])


def _layer(layer: int) -> int | None:
    return None if layer < 0 else layer


def _our_shape(tensor: GGUFTensor) -> tuple[int, ...]:
    """Shape in the parameter's orientation: kernels are stored as [out, in], ours are [in, out]."""
    return tensor.shape if tensor.name == "token_embd.weight" else tensor.shape[::-1]


def _read(
    config: TransformerConfig, stored: dict[str, Any], targets: list[tuple[str, int, str]], permuted: bool
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """The tensors for `assemble`; `permuted` says that rows of q and k have llama.cpp's order."""
    for target, layer, name in targets:
        array = _dequantize(stored[name])
        if permuted and "attention/q_proj/" in target:
            array = _unpermute(array, config.num_heads)
        elif permuted and "attention/k_proj/" in target:
            array = _unpermute(array, config.num_kv_heads)
        yield target, _layer(layer), array.T if target.endswith("/kernel") else array


def _dequantize(tensor: Any) -> np.ndarray:
    """float32 values in the stored shape, exact for every supported type."""
    return require("gguf.quants", "models").dequantize(tensor.data, tensor.tensor_type)


def _unpermute(rows: Float[np.ndarray, "out ..."], heads: int) -> Float[np.ndarray, "out ..."]:
    """Restores the row order that llama.cpp's converter changes.

    llama.cpp rotates pairs (2i, 2i + 1) of a head where we rotate (i, i + head_dim // 2), so its
    converter interleaves the two halves of each head's rows in q and k.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
