"""Writes a packed model as a Hugging Face directory in compressed-tensors' format pack-quantized.

Only what the format holds exactly is written: weights d (q - z) with integer zeros. `load_pretrained` reads the
directory back to the same codes and numbers. Rotations of the stream and of heads are in the weights; that of
feed-forward blocks' inner numbers, R4, becomes a `transform_config`, as llm-compressor's SpinQuant writes it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.extras import require
from bipolar_jax.models.exporters.huggingface_config import huggingface_config, model_type, token_ids
from bipolar_jax.models.exporters.stream_ends import folded_ends
from bipolar_jax.models.loaders.huggingface.config import ARCHITECTURES
from bipolar_jax.models.loaders.huggingface.quantized.words import pack_dense
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Linear
from bipolar_jax.nn.compressible import layer_at
from bipolar_jax.ops import Hadamard
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.groups import spread_groups

_ADVICE = (
    'quantize with the calibration "minmax" and float scales, or calibrate with Rounding(grid="zero_point"), '
    "such as to W4A16g64f"
)


@dataclasses.dataclass(frozen=True)
class _Group:
    """What config_groups says of layers."""

    bits: int
    symmetric: bool
    group_size: int | None
    a_bits: int | None
    a_symmetric: bool

    def fields(self, targets: list[str]) -> dict[str, Any]:
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        weights |= {"strategy": "channel" if self.group_size is None else "group", "group_size": self.group_size}
        activations = {"num_bits": self.a_bits, "type": "int", "symmetric": self.a_symmetric}
        activations |= {"strategy": "token", "dynamic": True}
        # Without the format, compressed-tensors takes weights beside rounded activations for int-quantized ones.
        return {
            "format": "pack-quantized",
            "targets": targets,
            "weights": weights,
            "input_activations": None if self.a_bits is None else activations,
            "output_activations": None,
        }


def export_compressed_tensors(directory: str | os.PathLike[str], pretrained: PretrainedModel) -> None:
    """Writes config.json, generation_config.json, the tokenizer, its chat template and model.safetensors.

    The tensors are in memory once more while they are written.

    Args:
      directory: made if it is missing; files of these names are replaced.
      pretrained: a model of the Llama family before `prepare_for_inference`, some of its layers packed.

    Raises:
      ValueError: a model or a layer that the format does not hold exactly, with what would do; no packed layer.
      ModuleNotFoundError: the extra "models" is not installed.
    """
    save_file = require("safetensors.numpy", "models").save_file
    directory, model = Path(directory), pretrained.model
    config, ends = folded_ends(model, states_ffn=True)
    fields = huggingface_config(config, model.final_norm.scale.dtype.name)
    tensors: dict[str, np.ndarray] = {}
    groups: dict[_Group, list[str]] = {}
    ignored: list[str] = []
    for name, module in _modules(model, ends):
        if isinstance(module, Linear):
            group, stored = _packed_tensors(name, module)
            groups.setdefault(group, []).append(name)
        else:
            stored = _float_tensors(module)
            ignored += [name] if isinstance(module, nnx.Linear) else []
        tensors |= {f"{name}.{suffix}": np.ascontiguousarray(array) for suffix, array in stored.items()}
    if not groups:
        raise ValueError(f"the model has no packed layer: {_ADVICE}")
    lone = len(groups) == 1
    fields["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": group.fields(["Linear"] if lone else names) for i, (group, names) in enumerate(groups.items())
        },
        "ignore": ignored if not config.tie_embeddings else [*ignored, "lm_head"],
    }
    if config.rotation is not None:
        fields["quantization_config"]["transform_config"] = {"config_groups": {"R4": _r4(config.rotation.ffn)}}
    texts = {"config.json": fields, "generation_config.json": token_ids(model.config)}
    template = pretrained.chat_template
    texts["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        texts["tokenizer_config.json"] |= {"chat_template": template.source, **template.special_tokens}
    with atomic_write(directory / "model.safetensors") as path:
        save_file(tensors, path, {"format": "pt"})
    for name, text in texts.items():
        with atomic_write(directory / name) as path:
            path.write_text(json.dumps(text, indent=2) + "\n")
    with atomic_write(directory / "tokenizer.json") as path:
        path.write_text(pretrained.tokenizer.to_str())


def _modules(model: Transformer, ends: dict[str, nnx.Module]) -> Iterator[tuple[str, nnx.Module]]:
    """Every module with tensors, by its stored name."""
    architecture = ARCHITECTURES[model_type(model.config)]
    prefix = architecture.prefixes[0]
    for name, ours in architecture.top.items():
        if ours in ends:
            yield (name if ours == "lm_head" else f"{prefix}{name}"), ends[ours]
    for index in range(model.num_blocks):
        block = model.block(index)
        for name, ours in architecture.in_layer.items():
            try:
                module = layer_at(block, ours)
            except ValueError as error:
                raise ValueError(f"layer {index} has no {ours}: export the model before it is prepared") from error
            yield f"{prefix}{architecture.layers}{index}.{name}", module


def _r4(rotation: Hadamard) -> dict[str, Any]:
    """The group of a transform_config. Raises ValueError for a matrix that is not Sylvester's."""
    if rotation.signs is not None or rotation.block & (rotation.block - 1):
        raise ValueError(
            f"the inner numbers of feed-forward blocks are rotated in blocks of {rotation.block} at run time; the "
            'format states those of powers of two without signs: rotate with block=256, or with "foldable"'
        )
    down = {"targets": ["re:.*down_proj$"], "ignore": []}
    return {
        "type": "hadamard",
        "head_dim": rotation.block,
        "randomize": False,
        "requires_grad": False,
        "apply": [down | {"location": "input", "inverse": False}, down | {"location": "weight_input", "inverse": True}],
    }


def _float_tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    if isinstance(module, nnx.Embed):
        return {"weight": np.asarray(module.embedding[...])}
    if isinstance(module, nnx.RMSNorm):
        return {"weight": np.asarray(module.scale[...])}
    if not isinstance(module, nnx.Linear):
        raise ValueError(f"a {type(module).__name__} has no form in the format: export a model with float embeddings")
    bias = {} if module.bias is None else {"bias": np.asarray(module.bias[...])}
    return {"weight": np.asarray(module.kernel[...]).T, **bias}


def _packed_tensors(name: str, layer: Linear) -> tuple[_Group, dict[str, np.ndarray]]:
    """The group and the tensors of a packed layer. Raises ValueError that names it."""
    array = layer.kernel.get_value()
    if not isinstance(array, BipolarArray):
        raise ValueError(f"{name} is laid out for a device: export the model before prepare_for_inference")
    if array.groups is not None:
        raise ValueError(f"{name} has integer groups, the format has a float scale for each: {_ADVICE}")
    if layer.precision.a_span != 1:
        raise ValueError(f"{name} clips its activations, which the format cannot say: calibrate without it")
    bits, step, codes = array.bits, 2 * np.asarray(array.scale), np.asarray(array.codes())
    if array.format.ternary:
        codes, zero = codes + np.uint8(1), np.full(step.shape, 2)
    else:
        zero = _integer_zeros(name, array, step)
    n, k = codes.shape
    symmetric = bool((zero == 1 << (bits - 1)).all())
    tensors = {"weight_scale": _narrowest(step), "weight_shape": np.array([n, k], np.int64)}
    if layer.order is not None:
        order = np.asarray(layer.order[...])
        group_of = np.empty(k, np.int32)
        group_of[order] = np.asarray(spread_groups(np.arange(array.num_groups, dtype=np.int32), k, array.group_size))
        tensors["weight_g_idx"] = group_of
        codes = np.take(codes, np.argsort(order), axis=1)
    tensors["weight_packed"] = pack_dense(codes, bits)
    if not symmetric:
        tensors["weight_zero_point"] = pack_dense(zero.T.astype(np.uint8), bits).T
    if layer.bias is not None:
        tensors["bias"] = np.asarray(layer.bias[...])
    return _Group(bits, symmetric, array.group_size, layer.precision.a_bits, layer.precision.a_symmetric), tensors


def _integer_zeros(name: str, array: BipolarArray, step: Float[np.ndarray, "n groups"]) -> Int[np.ndarray, "n groups"]:
    """z of weights step (q - z). Raises ValueError if no integers give the array's numbers exactly."""
    most = array.format.max_value
    offset = np.zeros_like(step) if array.offset is None else np.asarray(array.offset)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(step == 0, (most + 1) // 2, np.round(most / 2 - offset / step))
    exact = (zero >= 0) & (zero <= most) & (step * (np.float32(most / 2) - zero.astype(np.float32)) == offset)
    if not exact.all():
        count = int((~exact).sum())
        raise ValueError(
            f"{name} has {count} of {exact.size} groups without an integer zero among its codes: {_ADVICE}"
        )
    return zero.astype(np.int64)


def _narrowest(step: Float[np.ndarray, "n groups"]) -> np.ndarray:
    """The steps as float16 or bfloat16 where that is exact, else as float32."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            narrow = step.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), step):
            return narrow
    return step
