"""Which format a checkpoint is quantized in, from its config files; formats that are not served are refused by name."""

from __future__ import annotations

from pathlib import Path

from bipolar_jax.models.loaders.huggingface.json_fields import Fields, read_json
from bipolar_jax.models.loaders.huggingface.quantized.awq import AWQ
from bipolar_jax.models.loaders.huggingface.quantized.bitnet import ACTIVATION_BITS, BitNet
from bipolar_jax.models.loaders.huggingface.quantized.bitsandbytes import BitsAndBytes
from bipolar_jax.models.loaders.huggingface.quantized.compressed_tensors import CompressedTensors
from bipolar_jax.models.loaders.huggingface.quantized.gptq import GPTQ
from bipolar_jax.models.loaders.huggingface.quantized.module import QuantizedFormat
from bipolar_jax.models.loaders.huggingface.quantized.transforms import Transforms
from bipolar_jax.models.packed_kernels import check_activations

SERVED = "gptq, awq, compressed-tensors, bitnet, bitsandbytes"
_FLOATS = "its weights are floats of few bits, no integer grid"
_REFUSED = {
    "fp8": _FLOATS,
    "fbgemm_fp8": _FLOATS,
    "finegrained_fp8": _FLOATS,
    "mxfp4": _FLOATS,
    "nvfp4": _FLOATS,
    "modelopt": _FLOATS,
    "fp_quant": _FLOATS,
    "aqlm": "its weights are entries of learned codebooks, no integer grid",
    "vptq": "its weights are entries of learned codebooks, no integer grid",
    "quip": "its weights are entries of a lattice codebook, no integer grid",
    "higgs": "its weights are entries of codebooks, no integer grid",
    "spqr": "it keeps outlying weights as sparse floats",
    "eetq": "its words are laid out for one GPU kernel",
    "hqq": "its zeros are floats, and its layout is that of one library",
    "quanto": "it stores pickled tensors of one library",
    "torchao": "it stores pickled tensors of one library",
    "auto-round": "its layout depends on its backend: export it as auto_gptq or auto_awq",
}
# Files of older checkpoints beside config.json, and what their method is.
_OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_format(directory: Path, activations: int | None = None) -> QuantizedFormat | None:
    """The format of a directory's quantized layers; None if it has none.

    Args:
      directory: with config.json.
      activations: bits of the activations of quantized layers, 1 to 8, or 16 for float ones; None takes what the files
        state, and 16 where they state nothing.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: a format that is not served, with the reason; other activations.
    """
    check_activations(activations)
    fields, method = _quantization(directory)
    if fields is None:
        if activations is not None:
            raise ValueError(
                f"{directory} is not quantized, so it takes no activations={activations}: use quantize_model"
            )
        return None
    a_bits = None if activations in (None, 16) else activations
    if method == "gptq":
        return GPTQ.of(fields, a_bits)
    if method == "awq":
        return AWQ.of(fields, a_bits)
    if method in ("compressed-tensors", "compressed_tensors"):
        return CompressedTensors.of(fields, a_bits, activations is None)
    if method == "bitnet":
        return BitNet.of(fields, ACTIVATION_BITS if activations is None else a_bits)
    if method in ("bitsandbytes", "bitsandbytes_8bit", "bitsandbytes_4bit"):
        return BitsAndBytes.of(fields, a_bits)
    if isinstance(method, str) and method in _REFUSED:
        raise ValueError(f"{fields.source} is quantized by {method}, which is not served: {_REFUSED[method]}")
    raise fields.wrong("quant_method", method, SERVED)


def read_transforms(directory: Path) -> Transforms:
    """The rotations that a directory's quantization leaves to run time. Raises ValueError as `Transforms.of`."""
    fields, _ = _quantization(directory)
    return Transforms(directory) if fields is None else Transforms.of(fields)


def _quantization(directory: Path) -> tuple[Fields | None, object]:
    """What the files say of the quantization, and its method."""
    path = directory / "config.json"
    config = Fields(read_json(path), path)
    for name in ("quantization_config", "compression_config"):
        fields = config.nested(name)
        if fields.values:  # null and {} say that it is not quantized
            return fields, fields.get("quant_method", _method_of(fields))
    for name, method in _OLDER_FILES.items():
        if (directory / name).is_file():
            fields = Fields(read_json(directory / name), directory / name)
            return fields, fields.get("quant_method", method)
    return None, None


def _method_of(fields: Fields) -> str | None:
    """The method that fields imply where none is named."""
    if "config_groups" in fields.values:
        return "compressed-tensors"
    return "bitsandbytes" if {"load_in_8bit", "load_in_4bit"} & set(fields.values) else None
