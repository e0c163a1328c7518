"""Replaces the layers of any model by packed ones, chosen by path."""

from __future__ import annotations

from typing import Any

from flax import linen, nnx

from bipolar_jax.nn.convert.layer_paths import other_layers, places_of
from bipolar_jax.nn.convert.quantize_linen import quantize_linen
from bipolar_jax.nn.convert.rules import Rules, decide
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.layers.linear_general import LinearGeneral
from bipolar_jax.nn.training.stateful_dot_general import Trained
from bipolar_jax.quantize import Precision

_FLOAT_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Embed)
_ELIGIBLE = "nnx.Linear, nnx.LinearGeneral or nnx.Embed"


def quantize_model[Model: nnx.Module](
    model: Model, rules: Rules | None = None, *linen_arguments: Any, implementation: str = "auto", **linen_options: Any
) -> Model:
    """A copy of a model with packed layers in place of float ones.

    The layers that can be replaced are `nnx.Linear`, `nnx.LinearGeneral` (with it the
    projections of `nnx.MultiHeadAttention`) and `nnx.Embed`, at any depth, also stacked
    ones. A layer's path is its attribute names joined by "/", such as
    "layers/ffn/down_proj". A layer that stands at several paths (tied) is replaced once,
    by the rule for its first path, and stays tied.

    Layers trained with `DotGeneral` are packed as they were trained, and compute the same
    numbers to the bit; without rules they are all that is replaced.

    A linen model takes its variables and example inputs too, and becomes a pair:

        packed_model, packed_variables = quantize_model(model, rules, variables, x, train=False)
        y = packed_model.apply(packed_variables, x, train=False)

    Its layers are `linen.Dense` and `linen.DenseGeneral`; see `quantize_linen`.

    Args:
      model: any NNX module; it is left as it was. What is not replaced is shared with it.
      rules: (pattern, precision) pairs. A pattern is a regular expression searched for
        anywhere in the path; the first rule that matches a layer decides. Precision None
        leaves the layer as it is, and so does no match. Without rules, layers trained with
        `DotGeneral` are replaced.
      implementation: backend of the new layers, see `bipolar_jax.matmul`; "auto" leaves
        trained layers the one they were trained with.

    Returns:
      A module of the same class; for linen, a `PackedLinen` and its variables.

    Raises:
      ValueError: a rule that decides no layer (the message lists near misses), a pattern
        that is not a regular expression, a precision other than the layer was trained
        with, no rules and no trained layer, or weights that cannot be quantized.
    """
    if isinstance(model, linen.Module):
        return quantize_linen(model, rules, *linen_arguments, implementation=implementation, **linen_options)
    if not isinstance(model, nnx.Module) or linen_arguments or linen_options:
        raise ValueError(
            f"got a {type(model).__name__}{' with variables or inputs' if linen_arguments or linen_options else ''}: "
            "give an nnx.Module and rules, or a linen.Module, rules, its variables and example inputs"
        )
    quantized = nnx.clone(model)
    if type(quantized) in _FLOAT_LAYERS:
        name = "LinearGeneral" if Trained.of(quantized) else type(quantized).__name__
        raise ValueError(
            f"the model is itself an {type(quantized).__name__}, with no path for a rule to match: "
            f"use bipolar_jax.nn.{name}.from_float"
        )
    places = places_of(quantized, _FLOAT_LAYERS)
    first_paths: dict[int, str] = {}
    for place in places:
        first_paths.setdefault(id(place.layer), place.path)
    if rules is None:
        precisions = {
            place.path: trained.dot_general.precision for place in places if (trained := Trained.of(place.layer))
        }
        if not precisions:
            raise ValueError(
                "no layer of the model was trained with DotGeneral, so rules must say what to quantize: "
                '[(".*", Precision.parse("W4A8"))] quantizes every layer'
            )
    else:
        paths, tied = list(first_paths.values()), [place.path for place in places]
        precisions = decide(rules, paths, other_layers(quantized, _FLOAT_LAYERS), _ELIGIBLE, tied)
    packed: dict[int, nnx.Module] = {}
    for place in places:
        precision = precisions.get(first_paths[id(place.layer)])
        if precision is not None:
            if id(place.layer) not in packed:
                packed[id(place.layer)] = _pack(place.path, place.layer, precision, implementation)
            place.put(packed[id(place.layer)])
    return quantized


def _pack(path: str, layer: nnx.Module, precision: Precision, implementation: str) -> nnx.Module:
    try:
        if isinstance(layer, nnx.Embed):
            return Embed.from_float(layer, precision, implementation=implementation)
        if isinstance(layer, nnx.Linear) and Trained.of(layer) is None:
            return Linear.from_float(layer, precision, implementation=implementation)
        return LinearGeneral.from_float(layer, precision, implementation=implementation)
    except ValueError as error:
        raise ValueError(f"cannot quantize layer {path} to {precision}: {error}") from error
