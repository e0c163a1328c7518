"""Writes a packed model as a GGUF file, which llama.cpp and `load_pretrained` read to the same integers.

Files say nothing of activations; scales and minimums are float16. Rounding them is the only difference, and the report
states it for each layer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.extras import require
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.exporters.gguf_blocks import ADVICE, encode
from bipolar_jax.models.exporters.gguf_metadata import config_metadata, rope_factors, tokenizer_metadata
from bipolar_jax.models.exporters.huggingface_config import model_type
from bipolar_jax.models.exporters.stream_ends import folded_ends
from bipolar_jax.models.loaders.gguf.architectures import PERMUTED
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed, Linear
from bipolar_jax.nn.compressible import layer_at

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# GGUF's names of the tensors of the model, and of each layer, by ours.
TOP = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "attention_norm": "attn_norm",
    "attention/q_proj": "attn_q",
    "attention/k_proj": "attn_k",
    "attention/v_proj": "attn_v",
    "attention/o_proj": "attn_output",
    "attention/q_norm": "attn_q_norm",
    "attention/k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "ffn/gate_proj": "ffn_gate",
    "ffn/up_proj": "ffn_up",
    "ffn/down_proj": "ffn_down",
}


@dataclasses.dataclass(frozen=True)
class ExportedTensor:
    """A packed tensor of the file.

    Attributes:
      name: in the file.
      type_name: GGUF's.
      error: see `gguf_blocks.Blocks`.
    """

    name: str
    type_name: str
    error: float


@dataclasses.dataclass(frozen=True)
class GGUFExport:
    """What became of the packed layers; prints as a table of types."""

    tensors: tuple[ExportedTensor, ...]

    @property
    def error(self) -> float:
        """The largest relative error of a tensor; 0 if all numbers are exact."""
        return max(tensor.error for tensor in self.tensors)

    def __str__(self) -> str:
        lines = []
        for type_name in dict.fromkeys(tensor.type_name for tensor in self.tensors):
            worst = max((each for each in self.tensors if each.type_name == type_name), key=lambda each: each.error)
            count = sum(each.type_name == type_name for each in self.tensors)
            lines.append(f"{type_name}: {count} tensors, scales rounded by at most {worst.error:.2e} in {worst.name}")
        return "\n".join(lines)


def export_gguf(
    path: str | os.PathLike[str],
    pretrained: PretrainedModel,
    *,
    type_name: str | None = None,
    most_error: float = 2e-3,
) -> GGUFExport:
    """Writes the weights, the tokenizer, its chat template and the config as one GGUF file.

    Packed layers keep their integers; their scales and minimums become float16. Each takes the first of Q4_0, Q4_1,
    Q5_0, Q5_1 and Q8_0 that holds its integers: grids of up to 4 bits with zero code 8, or of up to 3 bits without
    offsets, are Q4_0; all others of up to 4 bits, also of integer groups, Q4_1. Float matrices are F16, BF16 or F32,
    whichever is exact. Rotations that are folded are no hindrance: where a tied embedding is rotated at run time, the
    file has a rotated one and an output layer of its own. The tensors are in memory once more while they are written.

    Args:
      path: of the file, by convention ending in .gguf; it is written atomically.
      pretrained: a Llama, Qwen2 or Qwen3 model before `prepare_for_inference`, some of its layers packed, with a
        byte-level or SentencePiece BPE tokenizer.
      type_name: one of the types for all packed layers: Q8_0 holds integer groups with the roundings of one scale.
      most_error: relative error of a layer's weights by that rounding, beyond which it is refused.

    Returns:
      The types and the errors.

    Raises:
      ValueError: a model, a tokenizer or a layer that GGUF does not hold, with what would do; no packed layer.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    library, model = require("gguf", "models"), pretrained.model
    arch = model_type(model.config)
    if arch not in _ARCHITECTURES:
        raise ValueError(f"{arch} models are not written to GGUF files, only {', '.join(_ARCHITECTURES)} are")
    config, ends = folded_ends(model)
    metadata = config_metadata(config, arch) | tokenizer_metadata(pretrained)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    exported: list[ExportedTensor] = []
    for name, module in _modules(model, ends):
        heads = _interleaved_heads(config, name) if arch in PERMUTED else 0
        if isinstance(module, Linear | Embed):
            stored, error = _packed_rows(name, module, type_name)
            if error > most_error:
                raise ValueError(
                    f"{name}: rounding its scales to float16 moves the weights by {error:.1e} of their size, more than "
                    f"most_error={most_error:g}: scale them up, or quantize again"
                )
            exported.append(ExportedTensor(name, stored[1], error))
        else:
            stored = _float_rows(module)
        tensors[f"{name}.weight"] = (_interleaved(stored[0], heads), stored[1])
        if getattr(module, "bias", None) is not None:
            tensors[f"{name}.bias"] = (_interleaved(np.asarray(module.bias[...], np.float32), heads), "F32")
    if not exported:
        raise ValueError(f"the model has no packed layer: {ADVICE}")
    if (factors := rope_factors(config)) is not None:
        tensors["rope_freqs.weight"] = (factors, "F32")
    with atomic_write(Path(path)) as temporary:
        _write(library, temporary, arch, metadata, tensors)
    return GGUFExport(tuple(exported))


def _modules(model: Transformer, ends: dict[str, nnx.Module]) -> Iterator[tuple[str, nnx.Module]]:
    """Every module with tensors, by its name in the file."""
    for ours, module in ends.items():
        yield TOP[ours], module
    for index in range(model.num_blocks):
        block = model.block(index)
        for ours, name in IN_LAYER.items():
            if ours.endswith(("/q_norm", "/k_norm")) and not model.config.qk_norm:
                continue
            try:
                module = layer_at(block, ours)
            except ValueError as error:
                raise ValueError(f"layer {index} has no {ours}: export the model before it is prepared") from error
            yield f"blk.{index}.{name}", module


def _packed_rows(name: str, layer: Linear | Embed, type_name: str | None) -> tuple[tuple[np.ndarray, str], float]:
    """Bytes of a packed layer's rows with their type, and the error. Raises ValueError that names it."""
    if getattr(layer, "order", None) is not None:
        raise ValueError(
            f"{name} reads its inputs in another order, which GGUF does not say: calibrate without act-order"
        )
    weights = layer.embedding if isinstance(layer, Embed) else layer.kernel
    try:
        blocks = encode(weights.get_value(), type_name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return (blocks.raw, blocks.type_name), blocks.error


def _float_rows(module: nnx.Module) -> tuple[np.ndarray, str]:
    """The weights of a float module, a matrix with the outputs as rows, in the smallest dtype that is exact."""
    if isinstance(module, nnx.RMSNorm):
        return np.asarray(module.scale[...], np.float32), "F32"
    rows = np.asarray(module.embedding[...] if isinstance(module, nnx.Embed) else module.kernel[...].T, np.float32)
    for name, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            narrow = rows.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), rows):
            return narrow.view(np.uint8), name
    return rows, "F32"


def _interleaved_heads(config: TransformerConfig, name: str) -> int:
    """Heads of a projection whose rows have llama.cpp's order; 0 for others."""
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.rpartition(".")[2], 0)


def _interleaved(rows: Shaped[np.ndarray, "out ..."], heads: int) -> Shaped[np.ndarray, "out ..."]:
    """The rows of every head in the order of llama.cpp, which rotates neighbours: the two halves alternate."""
    if not heads:
        return rows
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def _write(
    library: Any, path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]]
) -> None:
    writer = library.GGUFWriter(path, arch)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, (array, type_name) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=library.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
