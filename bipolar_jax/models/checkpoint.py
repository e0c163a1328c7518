"""Models on disk: packed weights, config, precisions and tokenizer in one .safetensors file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bipolar_jax.checkpoint import load, read_user, save
from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.models.assemble import abstract_model, check_param_dtype, count_not_finite
from bipolar_jax.models.chat import ChatTemplate
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import parse_tokenizer
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed, Linear, quantization_aware, quantize_model
from bipolar_jax.nn.compressible import layer_at
from bipolar_jax.nn.layers.linear import InputOrder
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize import Precision


def save_model(path: str | os.PathLike[str], pretrained: PretrainedModel, source: str = "") -> None:
    """Writes a model, quantized or not, with everything needed to run it.

    A model that is cut over devices of several processes is saved by all of them together, see `checkpoint.save`.

    Args:
      path: file to write, by convention ending in .safetensors; it is written atomically.
      pretrained: the model and its tokenizer.
      source: free text on the origin of the weights.

    Raises:
      ValueError: a model without its tokenizer; or as `save`.
      OSError: the file cannot be written.
    """
    if not isinstance(pretrained, PretrainedModel):
        raise ValueError(
            f"save_model writes a PretrainedModel, got a {type(pretrained).__name__}: give a model with its tokenizer, "
            "PretrainedModel(model, tokenizer), or write arrays alone with bipolar_jax.save"
        )
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
        "param_dtype": model.final_norm.scale.dtype.name,
        "precisions": precisions,
        "tokenizer": pretrained.tokenizer.to_str(),
    }
    if len(model.runs) > 1:
        user["runs"] = [[run.start, run.stop] for run in model.runs]
    if pretrained.chat_template is not None:
        user["chat_template"] = dataclasses.asdict(pretrained.chat_template)
    save(path, tree, user)


def load_model(
    path: str | os.PathLike[str],
    bits: int | None = None,
    param_dtype: Any = None,
    place: Callable[[Transformer], Mapping[str, Any]] | None = None,
) -> PretrainedModel:
    """Reads a file written by `save_model`.

    Args:
      path: the file.
      bits: most weight bits to read; packed arrays with more bits are truncated to their top
        planes, and only those planes are read.
      param_dtype: dtype of the float parameters and of the computation; None keeps the file's.
      place: of the model's shapes and dtypes, makes the shardings of its arrays by path, see `checkpoint.load`; None
        puts all on the default device. `load_sharded` gives one.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file has no model, is truncated or corrupted, or is from another version; a param_dtype other
        than float32, bfloat16 and float16, or whose range is too small.
    """
    asked = None if param_dtype is None else check_param_dtype(param_dtype)
    user = read_user(path)
    if not {"config", "param_dtype", "precisions", "tokenizer"} <= set(user):
        raise ValueError(f"{path} holds packed arrays but no model: read it with bipolar_jax.load")
    with _errors_name(path):
        config = TransformerConfig.from_dict(user["config"])
        saved = check_param_dtype(_text(user["param_dtype"], "param_dtype"))
        template = ChatTemplate.from_dict(user["chat_template"]) if "chat_template" in user else None
        runs = tuple(range(*map(operator.index, run)) for run in user.get("runs", ())) or (range(config.num_layers),)

    def packed_model(dtype):
        return _abstract_packed(config, dtype.name, runs, json.dumps(user["precisions"]), bits)

    shardings = None
    if place is not None:
        with _errors_name(path):
            abstract = packed_model(saved)
        shardings = place(abstract)
    stored = _flatten(load(path, bits, shardings))
    with _errors_name(path):
        # Before the packed layers are traced, which allocates in proportion to the sizes.
        float_model = jax.eval_shape(lambda model: model.with_runs(runs), abstract_model(config, saved.name))
        _check_shapes(path, stored, _leaves(float_model))
        tokenizer = parse_tokenizer(_text(user["tokenizer"], "tokenizer"), path, config.vocab_size)
        abstract = packed_model(saved)
    _check_leaves(path, stored, _leaves(abstract))
    if asked not in (None, saved):
        stored, abstract = _in_dtype(path, stored, asked), packed_model(asked)
    graph, state = nnx.split(abstract)
    flat = [(keys, variable.replace(stored["/".join(map(str, keys))])) for keys, variable in nnx.to_flat_state(state)]
    return PretrainedModel(nnx.merge(graph, nnx.from_flat_state(flat)), tokenizer, template)


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of what a damaged file, or one of another version, describes become a ValueError that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        if str(error).startswith(str(path)):
            raise
        problem = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is damaged, or was written by another version of bipolar_jax: {problem:.500}"
        ) from error


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a text")
    return value


@functools.lru_cache(maxsize=4)  # tracing takes a tenth of a second
def _abstract_packed(
    config: TransformerConfig, param_dtype: str, runs: tuple[range, ...], precisions: str, bits: int | None
) -> Transformer:
    """Shapes and dtypes of a model with the packed layers that this JSON describes."""

    def build():
        model = Transformer(config, param_dtype=jnp.dtype(param_dtype), rngs=nnx.Rngs(0)).with_runs(runs)
        return _packed(model, json.loads(precisions), bits)

    return nnx.eval_shape(build)


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
    model = quantize_model(model, rules)
    for path, description in precisions.items():
        if description.get("ordered"):
            layer = layer_at(model, path)
            layer.order = InputOrder(jnp.zeros(layer.kernel.shape[:-1], jnp.int32))
    return model


def _describe(layer: Linear | Embed) -> dict[str, Any]:
    """The JSON description of a packed layer, from which `_packed` rebuilds its structure."""
    precision = layer.precision
    number_format = as_format(precision.w_bits)
    description = {
        "bits": number_format.bits,
        "ternary": number_format.ternary,
        "a_bits": precision.a_bits,
        "group_size": precision.group_size,
        "calibration": precision.calibration,
        "scales": precision.scales,
    }
    if precision.a_span != 1:
        description["a_span"] = precision.a_span
    if precision.a_symmetric:
        description["a_symmetric"] = True
    if isinstance(layer, Linear) and layer.order is not None:
        description["ordered"] = True
    if isinstance(layer, Linear) and layer.trained is not None:
        description["trained"] = {
            "learned_steps": layer.learned_steps,
            "clip_activations": layer.trained.clip_activations,
        }
    return description


def _precision(description: dict[str, Any], bits: int | None) -> Precision:
    number_format = BipolarFormat(description["bits"], ternary=description["ternary"])
    if bits is not None and not number_format.ternary and bits < number_format.bits:
        number_format = number_format.truncate(bits)
    fields = (description[name] for name in ("a_bits", "group_size", "calibration"))
    options = {name: description[name] for name in ("a_span", "a_symmetric") if name in description}
    return Precision(number_format, *fields, description.get("scales", "float"), **options)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by path joined by "/"."""
    flat = {}
    for key, node in tree.items():
        flat |= _flatten(node, f"{prefix}{key}/") if isinstance(node, dict) else {f"{prefix}{key}": node}
    return flat


def _leaves(abstract: Transformer) -> dict[str, Any]:
    """Shapes and dtypes of the parameters by path."""
    return {"/".join(map(str, keys)): variable.get_value() for keys, variable in nnx.to_flat_state(nnx.state(abstract))}


def _check_shapes(path: str | os.PathLike[str], stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises ValueError unless the parameters of the float model are there, packed or not, in its shapes."""
    if missing := sorted(set(expected) - set(stored)):
        raise ValueError(
            f"{path} contradicts its own config: it lacks {missing} and has in excess nothing; write it again"
        )
    for name, leaf in expected.items():
        if stored[name].shape != leaf.shape:
            raise ValueError(
                f"{path} has {name} {_layout(stored[name])}, but its config asks for {_layout(leaf)}: write it again"
            )


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
        if name.endswith("/order") and not _are_orders(np.asarray(leaf)):
            raise ValueError(f"{path}: {name} does not name every input once: write it again")
        for array in jax.tree.leaves(leaf):
            if jnp.issubdtype(array.dtype, jnp.floating) and (bad := sum(map(count_not_finite, _parts(array)))):
                raise ValueError(f"{path}: {name} has {bad} values that are not finite: quantize the model again")


def _parts(array: jax.Array) -> Iterator[np.ndarray]:
    """What this process has of an array, each number once."""
    return (np.asarray(shard.data) for shard in array.addressable_shards if shard.replica_id == 0)


def _are_orders(orders: np.ndarray) -> bool:
    return bool((np.sort(orders, axis=-1) == np.arange(orders.shape[-1])).all())


def _in_dtype(path: str | os.PathLike[str], stored: dict[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """The leaves with the float parameters in another dtype; packed arrays stay as they are."""
    others = {name: leaf for name, leaf in stored.items() if not isinstance(leaf, BipolarArray)}
    cast = {name: leaf.astype(dtype) for name, leaf in others.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    for name, array in cast.items():
        if bad := sum(map(count_not_finite, _parts(array))):
            raise ValueError(f"{path}: {name} has {bad} values beyond the range of {dtype.name}: give a wider dtype")
    return stored | cast


def _layout(leaf: Any) -> str:
    arrays = ", ".join(f"{array.dtype.name}{list(array.shape)}" for array in jax.tree.leaves(leaf))
    if not isinstance(leaf, BipolarArray):
        return arrays
    return f"{arrays} with {leaf.format}, axis={leaf.axis}, group_size={leaf.group_size}"
