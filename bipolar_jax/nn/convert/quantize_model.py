"""Replaces the float layers of a model by packed layers."""

from __future__ import annotations

from typing import Any

from flax import linen, nnx

from bipolar_jax.nn.convert.layer_paths import first_references, layer_references, other_layers
from bipolar_jax.nn.convert.quantize_linen import quantize_linen
from bipolar_jax.nn.convert.rules import Rules, match_rules, trained_precisions
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.quantize import Precision

_FLOAT_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Embed)
_ELIGIBLE = "nnx.Linear, nnx.LinearGeneral or nnx.Embed"


def quantize_model[Model: nnx.Module](
    model: Model, rules: Rules | None = None, *linen_arguments: Any, implementation: str = "auto", **linen_options: Any
) -> Model:
    """Copies a model and replaces its float layers by packed layers.

    It replaces `nnx.Linear`, `nnx.LinearGeneral` (which includes the projections of
    `nnx.MultiHeadAttention`) and `nnx.Embed`, at any depth, also in stacks. The path of a layer
    is its attribute names and indices joined by "/", such as "layers/ffn/down_proj". A tied
    layer, which has several paths, is replaced once, by the rule for its first path, and stays
    tied.

    Layers trained with `DotGeneral` are packed at the precision of their training and then give
    the same bits. Without rules only these layers are replaced.

    For a linen model, give its variables and example inputs too; the result is a pair:

        packed_model, packed_variables = quantize_model(model, rules, variables, x, train=False)
        y = packed_model.apply(packed_variables, x, train=False)

    Of a linen model it replaces `linen.Dense` and `linen.DenseGeneral`; see `quantize_linen`.

    Args:
      model: any NNX module; it is not changed. The copy shares the arrays that are not replaced.
      rules: (pattern, precision) pairs. A pattern is a regular expression that is searched for
        anywhere in the path; the first rule that matches decides. A precision is a `Precision`, its
        text, such as "W4A8g64", or None. Layers with precision None and layers that no rule matches
        are not replaced. None (no rules) replaces the layers that were trained with `DotGeneral`.
      linen_arguments, linen_options: variables and example inputs of a linen model.
      implementation: backend of the new layers, see `bipolar_jax.matmul`; "auto" keeps the
        backend that a layer was trained with.

    Returns:
      A module of the same class; for linen, a `PackedLinen` and its variables.

    Raises:
      ValueError: a rule that decides no layer (the message lists near misses), a pattern
        that is not a regular expression, a precision that differs from that of training, no
        rules and no trained layer, or weights that cannot be quantized.
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
        name = "Embed" if isinstance(quantized, nnx.Embed) else "Linear"
        raise ValueError(
            f"the model is itself an {type(quantized).__name__}, so there is no path for a rule to match: "
            f"use bipolar_jax.nn.{name}.from_float"
        )
    references = layer_references(quantized, _FLOAT_LAYERS)
    first = first_references(references)
    if rules is None:
        precisions = trained_precisions({r.path: LayerQuantization.of(r.layer) for r in first.values()})
    else:
        paths, all_paths = ([r.path for r in some] for some in (first.values(), references))
        precisions = match_rules(rules, paths, other_layers(quantized, _FLOAT_LAYERS), _ELIGIBLE, all_paths)
    packed: dict[int, nnx.Module] = {}
    for reference in references:
        layer, path = reference.layer, first[id(reference.layer)].path
        precision = precisions.get(path)
        if precision is not None:
            if id(layer) not in packed:
                packed[id(layer)] = _pack(path, layer, precision, implementation)
            reference.replace(packed[id(layer)])
    return quantized


def _pack(path: str, layer: nnx.Module, precision: Precision, implementation: str) -> nnx.Module:
    """The packed layer for a float layer. Raises ValueError that names the path."""
    try:
        if isinstance(layer, nnx.Embed):
            return Embed.from_float(layer, precision, implementation=implementation)
        return Linear.from_float(layer, precision, implementation=implementation)
    except ValueError as error:
        raise ValueError(f"cannot quantize layer {path} to {precision}: {error}") from error
