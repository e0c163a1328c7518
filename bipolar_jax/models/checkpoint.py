"""Models on disk: packed weights, config, precisions and tokenizer in one .safetensors file."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bipolar_jax.checkpoint import load, read_user, save
from bipolar_jax.extras import require
from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.models.chat import ChatTemplate
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed, Linear, LinearGeneral, quantization_aware, quantize_model
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize import Precision


def save_model(path: str | os.PathLike[str], pretrained: PretrainedModel, source: str = "") -> None:
    """Writes a model, quantized or not, with everything needed to run it.

    Args:
      path: file to write, by convention ending in .safetensors; it is written atomically.
      pretrained: the model and its tokenizer.
      source: free text on the origin of the weights.
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
        if isinstance(layer, Linear | LinearGeneral | Embed)
    }
    user = {
        "source": source,
        "config": model.config.to_dict(),
        "param_dtype": model.final_norm.scale.dtype.name,
        "precisions": precisions,
        "tokenizer": pretrained.tokenizer.to_str(),
    }
    if pretrained.chat_template is not None:
        user["chat_template"] = dataclasses.asdict(pretrained.chat_template)
    save(path, tree, user)


def load_model(path: str | os.PathLike[str], bits: int | None = None) -> PretrainedModel:
    """Reads a file written by `save_model`.

    Args:
      path: the file.
      bits: most weight bits to read; packed arrays with more bits are truncated to their top
        planes, and only those planes are read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file has no model, is truncated or corrupted, or is from another version.
    """
    tokenizers = require("tokenizers", "models")
    user = read_user(path)
    if not {"config", "param_dtype", "precisions", "tokenizer"} <= set(user):
        raise ValueError(f"{path} holds packed arrays but no model: read it with bipolar_jax.load")
    config = TransformerConfig.from_dict(user["config"])
    stored = _flatten(load(path, bits))
    param_dtype = jnp.dtype(user["param_dtype"])
    abstract = nnx.eval_shape(
        lambda: _packed(Transformer(config, param_dtype=param_dtype, rngs=nnx.Rngs(0)), user["precisions"], bits)
    )
    graph, state = nnx.split(abstract)
    expected = {"/".join(map(str, keys)): variable.get_value() for keys, variable in nnx.to_flat_state(state)}
    _check_leaves(path, stored, expected)
    flat = [(keys, variable.replace(stored["/".join(map(str, keys))])) for keys, variable in nnx.to_flat_state(state)]
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    template = ChatTemplate.from_dict(user["chat_template"]) if "chat_template" in user else None
    return PretrainedModel(model, tokenizers.Tokenizer.from_str(user["tokenizer"]), template)


def _packed(model: Transformer, precisions: dict[str, dict[str, Any]], bits: int | None) -> Transformer:
    """The model with the packed layers that `_describe` described."""
    all_options = [description["trained"] for description in precisions.values() if "trained" in description]
    for index, options in enumerate(all_options):
        if options in all_options[:index]:
            continue
        rules = [
            (f"^{re.escape(path)}$", _precision(description, bits))
            for path, description in precisions.items()
            if description.get("trained") == options
        ]
        model = quantization_aware(model, rules, **options)
    rules = [(f"^{re.escape(path)}$", _precision(description, bits)) for path, description in precisions.items()]
    return quantize_model(model, rules)


def _describe(layer: Linear | LinearGeneral | Embed) -> dict[str, Any]:
    """The JSON description of a packed layer, from which `_packed` rebuilds its structure."""
    precision = layer.precision
    number_format = as_format(precision.w_bits)
    description = {
        "bits": number_format.bits,
        "ternary": number_format.ternary,
        "a_bits": precision.a_bits,
        "group_size": precision.group_size,
        "calibration": precision.calibration,
    }
    if isinstance(layer, LinearGeneral):  # trained with DotGeneral
        description["trained"] = {
            "learned_steps": layer.learned_steps,
            "clip_activations": layer.dot_general.clip_activations,
        }
    return description


def _precision(description: dict[str, Any], bits: int | None) -> Precision:
    number_format = BipolarFormat(description["bits"], ternary=description["ternary"])
    if bits is not None and not number_format.ternary and bits < number_format.bits:
        number_format = number_format.truncate(bits)
    return Precision(number_format, description["a_bits"], description["group_size"], description["calibration"])


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by path joined by "/"."""
    flat = {}
    for key, node in tree.items():
        flat |= _flatten(node, f"{prefix}{key}/") if isinstance(node, dict) else {f"{prefix}{key}": node}
    return flat


def _check_leaves(path: str | os.PathLike[str], stored: dict[str, Any], expected: dict[str, Any]) -> None:
    missing, surplus = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or surplus:
        raise ValueError(
            f"{path} contradicts its own config: it lacks {missing or 'nothing'} and has in excess "
            f"{surplus or 'nothing'}; write it again"
        )
    for name, leaf in stored.items():
        if _layout(leaf) != _layout(expected[name]):
            raise ValueError(
                f"{path} has {name} {_layout(leaf)}, but its config asks for {_layout(expected[name])}: write it again"
            )


def _layout(leaf: Any) -> str:
    arrays = ", ".join(f"{array.dtype.name}{list(array.shape)}" for array in jax.tree.leaves(leaf))
    if not isinstance(leaf, BipolarArray):
        return arrays
    return f"{arrays} with {leaf.format}, axis={leaf.axis}, group_size={leaf.group_size}"
