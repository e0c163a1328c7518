"""The packed kernels of a quantized directory, by the parameters that they are loaded into."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.huggingface.architecture import Architecture, Target
from bipolar_jax.models.loaders.huggingface.quantized.module import Module, QuantizedFormat
from bipolar_jax.models.loaders.huggingface.safetensors_files import SafetensorsFiles
from bipolar_jax.models.packed_kernels import PackedNumbers, PackedTensor, unified

Key = tuple[str, int | None]


def packed_tensors(
    architecture: Architecture, config: TransformerConfig, files: SafetensorsFiles, quantized: QuantizedFormat
) -> tuple[dict[Key, PackedTensor], list[str]]:
    """The packed kernels by path and layer; and the names of all tensors that are stored as floats.

    Biases of quantized layers that the model does not have are left out if they are all zeros, as AutoGPTQ stores them.

    Raises:
      ValueError: tensors that the format or the architecture excludes, a quantized embedding, or no quantized layer.
    """
    suffix = f".{quantized.marker}"
    modules = {name.removesuffix(suffix): None for name in files if name.endswith(suffix)}
    if not modules:
        raise ValueError(f"the config states a quantization, but no tensor is named *{suffix}: download it again")
    names = [name for name in files if not _belongs(name, modules, quantized.suffixes)]
    found: dict[Key, PackedTensor] = {}
    for name in modules:
        for target in architecture.targets(f"{name}.weight", config.tie_embeddings):
            tensor = quantized.tensor(Module(name, files))
            _check_target(target, name)
            tensor = _rows_of(tensor, target, config) if target.beside else tensor
            found[target.path, None if target.layer < 0 else target.layer] = tensor
    names = [name for name in names if not _is_surplus_bias(name, modules, architecture, config, files)]
    kinds = unified({key: tensor.kind for key, tensor in found.items()})
    return {key: dataclasses.replace(tensor, kind=kinds[key]) for key, tensor in found.items()}, names


def _belongs(name: str, modules: dict[str, None], suffixes: tuple[str, ...]) -> bool:
    module, _, suffix = name.rpartition(".")
    return module in modules and suffix in suffixes


def _check_target(target: Target, name: str) -> None:
    if not target.path.endswith("/kernel"):
        raise ValueError(f"layer {name!r:.200} is quantized, but only linear layers are served packed")
    if target.path.endswith("/router/kernel"):
        raise ValueError(f"layer {name!r:.200} is quantized, but a router of experts is served as floats alone")
    if target.fused >= 0 or target.first_row:
        raise ValueError(f"layer {name!r:.200} is quantized and makes query, key and value at once: that is not served")


def _rows_of(tensor: PackedTensor, target: Target, config: TransformerConfig) -> PackedTensor:
    """The outputs of one of several layers that lie side by side. Raises ValueError for another number of them."""
    k, rows = tensor.shape
    shape = target.shape((rows, k), config)
    ((start, end, _),) = target.row_ranges(rows, config)

    def read() -> PackedNumbers:
        numbers = tensor.read()
        return dataclasses.replace(numbers.rows(slice(start, end)), order=numbers.order)

    return dataclasses.replace(tensor, shape=shape, read=read)


def _is_surplus_bias(
    name: str, modules: dict[str, None], architecture: Architecture, config: TransformerConfig, files: SafetensorsFiles
) -> bool:
    """Whether it is the bias, all zeros, of a quantized layer whose counterpart in the model has none."""
    module, _, suffix = name.rpartition(".")
    if module not in modules or suffix != "bias":
        return False
    (target, *_) = architecture.targets(name, config.tie_embeddings) or (None,)
    if target is None or _has_bias(target.path, config):
        return False
    shape = files.shape(name)
    return math.prod(shape) <= 1 << 24 and not np.any(files.read(name).astype(np.float32))


def _has_bias(path: str, config: TransformerConfig) -> bool:
    if path.endswith(("q_proj/bias", "k_proj/bias", "v_proj/bias")):
        return config.qkv_bias
    return config.linear_bias and path.startswith("layers/")
