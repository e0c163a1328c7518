"""Replaces the float layers of a model by packed layers."""

from __future__ import annotations

from typing import Any

from flax import linen, nnx

from bipolar_jax.nn.convert.float_layers import FLOAT_LAYERS, float_layers, warn_of_float_layers
from bipolar_jax.nn.convert.layer_paths import first_references, layer_references
from bipolar_jax.nn.convert.layer_runs import cut_by_rules, names_of_layers
from bipolar_jax.nn.convert.quantize_linen import quantize_linen
from bipolar_jax.nn.convert.rules import Rules, match_rules, trained_precisions
from bipolar_jax.nn.layers.einsum import Einsum
from bipolar_jax.nn.layers.embed import Embed
from bipolar_jax.nn.layers.linear import Linear
from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.quantize import Precision

_ELIGIBLE = "nnx.Linear, nnx.LinearGeneral or nnx.Embed (or an nnx.Einsum that plainly contracts its kernel)"
_PACKED = {nnx.Linear: Linear, nnx.LinearGeneral: Linear, nnx.Einsum: Einsum, nnx.Embed: Embed}


def quantize_model[Model: nnx.Module](
    model: Model, rules: Rules | None = None, *linen_arguments: Any, implementation: str = "auto", **linen_options: Any
) -> Model:
    """Copies a model and replaces its float layers by packed layers.

    It replaces `nnx.Linear`, `nnx.LinearGeneral` (which includes the projections of
    `nnx.MultiHeadAttention`), `nnx.Einsum` that plainly contracts its kernel, and `nnx.Embed`, at
    any depth, also in stacks and in other pytrees. `summary` prints the result. The path of a layer
    is its attribute names and indices joined by "/", such as "layers/ffn/down_proj". A tied
    layer, which has several paths, is replaced once, by the rule for its first path, and stays
    tied.

    Layers trained with `DotGeneral` are packed at the precision of their training and then give
    the same bits. Without rules only these layers are replaced.

    The layers of a `Transformer` are one stack. A pattern may name some of them, as "layers/3/ffn/down_proj" or
    "layers/0-4/" do: the stack is then cut into runs of equal layers, each of which is compiled by itself.

    For a linen model, give its variables and example inputs too; the result is a pair:

        packed_model, packed_variables = quantize_model(model, rules, variables, x, train=False)
        y = packed_model.apply(packed_variables, x, train=False)

    A subclass of Flax's layers stays float, because its calls may read the float weights. Pack it by a subclass of
    `bipolar_jax.nn.Linear`, `Einsum` or `Embed` with the same methods:

        class PackedScaledEmbed(bipolar_jax.nn.Embed):
            def __call__(self, ids, out_sharding=None):
                return super().__call__(ids, out_sharding) * self.features**0.5

        packed_model.embedder = PackedScaledEmbed.from_float(model.embedder, "W8A8")

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
        rules and no trained layer, or weights that cannot be quantized, such as those of a stack on
        another axis than the first.

    Warns:
      UserWarning: rules match layers with weights that stay float, such as convolutions, subclasses
        of Flax's layers or adapters; one warning with their number, bytes and reasons.
    """
    if isinstance(model, linen.Module):
        return quantize_linen(model, rules, *linen_arguments, implementation=implementation, **linen_options)
    if not isinstance(model, nnx.Module) or linen_arguments or linen_options:
        raise ValueError(
            f"got a {type(model).__name__}{' with variables or inputs' if linen_arguments or linen_options else ''}: "
            "give an nnx.Module and rules, or a linen.Module, rules, its variables and example inputs"
        )
    if rules is not None:
        model, rules = cut_by_rules(model, rules)
    quantized, names = nnx.clone(model), names_of_layers(model)
    if type(quantized) in FLOAT_LAYERS:
        raise ValueError(
            f"the model is itself an {type(quantized).__name__}, so there is no path for a rule to match: "
            f"use bipolar_jax.nn.{_PACKED[type(quantized)].__name__}.from_float"
        )
    left_float = [layer for layer in float_layers(quantized) if layer.reason is not None]
    left_ids = {id(each.layer) for each in left_float}
    references = [r for r in layer_references(quantized, FLOAT_LAYERS) if id(r.layer) not in left_ids]
    first = first_references(references)
    if rules is None:
        precisions = trained_precisions({r.path: LayerQuantization.of(r.layer) for r in first.values()})
    else:
        paths, all_paths = ([r.path for r in some] for some in (first.values(), references))
        reasons = {layer.path: layer.reason for layer in left_float}
        precisions = match_rules(rules, paths, reasons, _ELIGIBLE, all_paths, names)
    packed: dict[int, nnx.Module] = {}
    for reference in references:
        layer, path = reference.layer, first[id(reference.layer)].path
        precision = precisions.get(path)
        if precision is not None:
            if id(layer) not in packed:
                packed[id(layer)] = _pack(path, layer, precision, implementation)
            reference.replace(packed[id(layer)])
    if rules is not None:
        warn_of_float_layers(rules, left_float, names)
    return quantized


def _pack(path: str, layer: nnx.Module, precision: Precision, implementation: str) -> nnx.Module:
    """The packed layer for a float layer. Raises ValueError that names the path."""
    try:
        return _PACKED[type(layer)].from_float(layer, precision, implementation=implementation)
    except ValueError as error:
        raise ValueError(f"cannot quantize layer {path} to {precision}: {error}") from error
