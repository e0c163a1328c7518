"""Replaces the layers of any NNX model by packed ones, chosen by path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from bipolar_jax.nn.embed import Embed
from bipolar_jax.nn.linear import Linear
from bipolar_jax.quantize import Precision

Rules = Sequence[tuple[str, Precision | None]]

_PACKED_LAYERS = {nnx.Linear: Linear, nnx.Embed: Embed}
_NUM_NEAR_MISSES = 5


def quantize_model[Model: nnx.Module](model: Model, rules: Rules, *, implementation: str = "auto") -> Model:
    """A copy of a model with packed layers in place of float ones.

    The layers that can be replaced are `nnx.Linear` and `nnx.Embed`, at any depth, also
    stacked ones. A layer's path is its attribute names joined by "/", such as
    "layers/ffn/down_proj". A layer that stands at several paths (tied) is replaced once,
    by the rule for its first path, and stays tied.

    Args:
      model: any NNX module; it is left as it was. What is not replaced is shared with it.
      rules: (pattern, precision) pairs. A pattern is a regular expression searched for
        anywhere in the path; the first rule that matches a layer decides. Precision None
        leaves the layer as it is, and so does no match.
      implementation: backend of the new layers, see `bipolar_jax.matmul`.

    Returns:
      A module of the same class.

    Raises:
      ValueError: a rule that decides no layer (the message lists near misses), a pattern
        that is not a regular expression, or weights that cannot be quantized.
    """
    compiled = [_compile(pattern, precision) for pattern, precision in rules]
    quantized = nnx.clone(model)
    if type(quantized) in _PACKED_LAYERS:
        raise ValueError(
            f"the model is itself an {type(quantized).__name__}, with no path for a rule to match: "
            f"use bipolar_jax.nn.{type(quantized).__name__}.from_float"
        )
    layers = list(_float_layers(quantized, "", set()))
    deciding, packed = set(), {}
    for path, parent, key, layer in layers:
        if id(layer) not in packed:
            index = next((i for i, (pattern, _) in enumerate(compiled) if pattern.search(path)), None)
            deciding.add(index)
            precision = None if index is None else compiled[index][1]
            packed[id(layer)] = layer if precision is None else _pack(path, layer, precision, implementation)
        if packed[id(layer)] is not layer:
            _replace(path, parent, key, packed[id(layer)])
    _check_all_decide(compiled, deciding, [path for path, *_ in layers])
    return quantized


def _float_layers(node: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any, Any, nnx.Module]]:
    """Path, parent, key in the parent, and layer of everything that can be replaced."""
    if id(node) in seen:  # modules may refer to each other
        return
    seen.add(id(node))
    for key, child in _children(node):
        path = f"{prefix}{key}"
        if type(child) in _PACKED_LAYERS:
            yield path, node, key, child
        else:
            yield from _float_layers(child, f"{path}/", seen)


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, nnx.Module):
        return [(name, child) for name, child in vars(node).items() if not name.startswith("_pytree__")]
    return list(node.items()) if isinstance(node, dict) else []


def _replace(path: str, parent: Any, key: Any, layer: nnx.Module) -> None:
    if isinstance(parent, tuple):
        raise ValueError(f"layer {path} is in a tuple, where it cannot be replaced: use an nnx.List instead")
    if isinstance(parent, nnx.List | list | dict):
        parent[key] = layer
    else:
        setattr(parent, key, layer)


def _pack(path: str, layer: nnx.Module, precision: Precision, implementation: str) -> nnx.Module:
    try:
        return _PACKED_LAYERS[type(layer)].from_float(layer, precision, implementation=implementation)
    except ValueError as error:
        raise ValueError(f"cannot quantize layer {path} to {precision}: {error}") from error


def _compile(pattern: str, precision: Precision | None) -> tuple[re.Pattern[str], Precision | None]:
    if precision is not None and not isinstance(precision, Precision):
        raise ValueError(
            f"rule {pattern!r} has the precision {precision!r}: give a Precision, as Precision.parse reads it, or None"
        )
    try:
        return re.compile(pattern), precision
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from error


def _check_all_decide(compiled, deciding: set[int | None], paths: list[str]) -> None:
    for index, (pattern, _) in enumerate(compiled):
        if index in deciding:
            continue
        shadowed = [path for path in paths if pattern.search(path)]
        if shadowed:
            raise ValueError(
                f"rule {pattern.pattern!r} decides no layer: all it matches ({', '.join(shadowed[:_NUM_NEAR_MISSES])}) "
                "is decided by earlier rules, or by the first path of a tied layer; move it up or drop it"
            )
        if not paths:
            raise ValueError(
                f"rule {pattern.pattern!r} matches nothing: the model has no nnx.Linear or nnx.Embed left in float; "
                "layers that are packed already are not packed again"
            )
        near = difflib.get_close_matches(pattern.pattern, paths, n=_NUM_NEAR_MISSES, cutoff=0.0)
        raise ValueError(f"rule {pattern.pattern!r} matches no layer; the nearest paths are {', '.join(near)}")
