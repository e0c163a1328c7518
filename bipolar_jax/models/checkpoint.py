"""Whole models on disk: packed weights, config, precisions and tokenizer in one file."""

from __future__ import annotations

import os
from typing import Any

from flax import nnx

from bipolar_jax.checkpoint import load, read_user, save
from bipolar_jax.extras import require
from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed, Linear, quantize_model
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize import Precision


def save_model(path: str | os.PathLike[str], pretrained: PretrainedModel, source: str = "") -> None:
    """Writes a model, quantized or not, and all that is needed to run it.

    Args:
      path: file to write, by custom ending in .safetensors; it appears only when whole.
      pretrained: the model and its tokenizer.
      source: where the weights come from, in a few words.
    """
    model = pretrained.model
    tree: dict[str, Any] = {}
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(str(key), {})
        node[str(keys[-1])] = variable.get_value()
    precisions = {
        "/".join(map(str, keys)): _describe(layer)
        for keys, layer in nnx.iter_modules(model)
        if isinstance(layer, Linear | Embed)
    }
    user = {
        "source": source,
        "config": model.config.to_dict(),
        "precisions": precisions,
        "tokenizer": pretrained.tokenizer.to_str(),
    }
    save(path, tree, user)


def load_model(path: str | os.PathLike[str], bits: int | None = None) -> PretrainedModel:
    """Reads what `save_model` wrote.

    Args:
      path: the file.
      bits: weight bits to read at most; every packed array that has more is truncated to
        its top planes, whose file alone is read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, truncated, corrupted, or of another version.
    """
    tokenizers = require("tokenizers", "models")
    user = read_user(path)
    if "config" not in user or "precisions" not in user or "tokenizer" not in user:
        raise ValueError(f"{path} holds packed arrays but no model: read it with bipolar_jax.load")
    config = TransformerConfig.from_dict(user["config"])
    tree = load(path, bits)
    rules = [(f"^{path}$", _precision(described, bits)) for path, described in user["precisions"].items()]
    abstract = nnx.eval_shape(lambda: quantize_model(Transformer(config, rngs=nnx.Rngs(0)), rules))
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    filled = [(keys, variable.replace(_find(path, tree, keys, variable))) for keys, variable in flat]
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    return PretrainedModel(model, tokenizers.Tokenizer.from_str(user["tokenizer"]))


def _describe(layer: Linear | Embed) -> dict[str, Any]:
    precision = layer.precision
    number_format = as_format(precision.w_bits)
    return {
        "bits": number_format.bits,
        "ternary": number_format.ternary,
        "a_bits": precision.a_bits,
        "group_size": precision.group_size,
        "calibration": precision.calibration,
    }


def _precision(described: dict[str, Any], bits: int | None) -> Precision:
    number_format = BipolarFormat(described["bits"], ternary=described["ternary"])
    if bits is not None and not number_format.ternary and bits < number_format.bits:
        number_format = number_format.truncate(bits)
    return Precision(number_format, described["a_bits"], described["group_size"], described["calibration"])


def _find(path, tree: dict[str, Any], keys: tuple[Any, ...], variable: nnx.Variable) -> Any:
    node = tree
    for key in keys:
        if not isinstance(node, dict) or str(key) not in node:
            raise ValueError(f"{path} lacks {'/'.join(map(str, keys))}, which its config calls for: write it again")
        node = node[str(key)]
    expected = variable.get_value()
    same_kind = isinstance(node, BipolarArray) == isinstance(expected, BipolarArray)
    if not same_kind or node.shape != expected.shape:
        raise ValueError(
            f"{path} has {'/'.join(map(str, keys))} of shape {getattr(node, 'shape', None)}, "
            f"its config calls for {expected.shape}: write it again"
        )
    return node
