"""The layers of a model that are float: which of them can be packed, and why not the others."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable

from flax import nnx

from bipolar_jax.nn.convert.layer_paths import (
    class_name,
    first_references,
    layer_references,
    other_layers,
    own_parameters,
    own_weights,
)
from bipolar_jax.nn.convert.rules import Rules, chosen_precision
from bipolar_jax.nn.layers.einsum import why_not_contracted
from bipolar_jax.nn.layers.linear import foreign_dot_general
from bipolar_jax.nn.layers.packed import PackedModule, format_bytes, num_bytes

FLOAT_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed)
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class FloatLayer:
    """A layer with float parameters.

    Attributes:
      path: the first path to it.
      name: its class.
      reason: why it cannot be packed; None if it can.
      layer: the layer.
      weights: bytes of its parameters that are no biases, and no scales of norms; 0 of a layer that says why it is
        float by an attribute `stays_float`.
    """

    path: str
    name: str
    reason: str | None
    layer: nnx.Pytree
    weights: int


def float_layers(model: nnx.Module) -> list[FloatLayer]:
    """All layers with float parameters of their own, but for those with packed weights."""
    found = []
    for reference in first_references(layer_references(model, FLOAT_LAYERS)).values():
        layer = reference.layer
        why_not = why_not_contracted if isinstance(layer, nnx.Einsum) else foreign_dot_general
        reason = why_not(layer)
        name = class_name(layer)
        found.append(_described(reference.path, layer, None if reason is None else f"{name}: {reason}"))
    for reference in other_layers(model, FLOAT_LAYERS):
        if not isinstance(reference.layer, PackedModule):
            found.append(_described(reference.path, reference.layer, _why_float(reference.layer)))
    return found


def _why_float(layer: nnx.Pytree) -> str:
    """Why a layer of another class than `FLOAT_LAYERS` is not packed: it says so itself, or its class is unknown."""
    return getattr(layer, "stays_float", class_name(layer, FLOAT_LAYERS))


def _described(path: str, layer: nnx.Pytree, reason: str | None) -> FloatLayer:
    # Rules that match a layer which is float on purpose are not warned of.
    weights = {} if hasattr(layer, "stays_float") else own_weights(layer)
    size = sum(num_bytes(variable.get_value()) for variable in weights.values())
    return FloatLayer(path, type(layer).__name__, reason, layer, size)


def parameter_bytes(layer: nnx.Pytree) -> int:
    """Bytes of the float parameters that a layer holds itself."""
    return sum(num_bytes(variable.get_value()) for variable in own_parameters(layer).values())


def warn_of_float_layers(
    rules: Rules, layers: Iterable[FloatLayer], names: Callable[[str], tuple[str, ...]] = lambda path: (path,)
) -> None:
    """Warns once of weights that stay float although a rule gives them a precision; `names` as of `match_rules`."""
    matched = [layer for layer in layers if layer.weights and chosen_precision(rules, *names(layer.path)) is not None]
    warn_of_matched({layer.path: (layer.reason, layer.weights) for layer in matched}, stacklevel=4)


def warn_of_matched(matched: dict[str, tuple[str, int]], stacklevel: int) -> None:
    """Warns, if there are any, of layers that stay float, given as (reason, bytes) by path."""
    if not matched:
        return
    named = [f"{path or 'the model itself'} ({reason})" for path, (reason, _) in list(matched.items())[:_MOST_NAMED]]
    more = "" if len(matched) <= _MOST_NAMED else f" and {len(matched) - _MOST_NAMED} more"
    size = format_bytes(sum(size for _, size in matched.values()))
    layers = "layer that rules match stays" if len(matched) == 1 else "layers that rules match stay"
    warnings.warn(
        f"{len(matched)} {layers} float, {size}: {', '.join(named)}{more}; "
        "use Flax's own layers in their place, or pack subclasses of these as quantize_model's documentation shows; "
        "a rule with the precision None before them says so on purpose",
        stacklevel=stacklevel,
    )
