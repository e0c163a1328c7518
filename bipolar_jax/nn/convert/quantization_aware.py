"""Turns the layers of a model to training in low precision, chosen by path."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from bipolar_jax.nn.convert.layer_paths import other_layers, places_of
from bipolar_jax.nn.convert.rules import Rules, decide
from bipolar_jax.nn.layers.linear_general import folded_kernel
from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.stateful_dot_general import StatefulDotGeneral, Trained

_LAYERS = (nnx.Linear, nnx.LinearGeneral)


def quantization_aware[Model: nnx.Module](
    model: Model, rules: Rules, *, learned_steps: bool = False, rngs: nnx.Rngs | None = None, **options: Any
) -> Model:
    """A copy of a model whose layers multiply through `DotGeneral`: ready for quantization-aware training.

    Parameters stay float and are shared with the model; train the copy with any optimizer,
    then pack it with `quantize_model(copy)`. Called again with other rules it changes the
    bits, for schedules that lower them step by step; step sizes then begin anew.

    Args:
      model: any NNX module; it is left as it was.
      rules: as for `quantize_model`; the layers are `nnx.Linear` and `nnx.LinearGeneral`,
        with it the projections of `nnx.MultiHeadAttention`. Precision None makes a layer
        float again.
      learned_steps: gives each layer step sizes that are trained with it (LSQ, see
        `StatefulDotGeneral`), in place of calibrated scales.
      rngs: for quantized gradients, `gradient=GradientPrecision(bits=8)`.
      options: further attributes of `DotGeneral`, for all of the layers.

    Raises:
      ValueError: rules as in `quantize_model`; options that `DotGeneral` refuses.
    """
    trained = nnx.clone(model)
    places = places_of(trained, _LAYERS)
    layers = {id(place.layer): place for place in reversed(places)}  # tied layers by their first path
    firsts = [place for place in places if layers[id(place.layer)] is place]
    others = other_layers(trained, _LAYERS)
    precisions = decide(
        rules, [p.path for p in firsts], others, "nnx.Linear or nnx.LinearGeneral", [p.path for p in places]
    )
    for place in firsts:
        if place.path in precisions:
            _set(place.layer, precisions[place.path], learned_steps, rngs, options)
    return trained


def _set(layer, precision, learned_steps, rngs, options) -> None:
    if precision is None and Trained.of(layer) is None:
        return  # a dot_general of someone else's stays
    if isinstance(layer, nnx.LinearGeneral):
        layer.dot_general_cls = None  # which would come first
    if precision is None:
        layer.dot_general = nnx.static(jax.lax.dot_general)
        return
    dot_general = DotGeneral.of(precision, **options)
    stateful = learned_steps or rngs is not None
    if stateful:
        kernel = folded_kernel(layer, layer.kernel[...])
        dot_general = StatefulDotGeneral(dot_general, kernel, learned_steps=learned_steps, rngs=rngs)
    # Flax counts a layer's dot_general as static, which a module is not.
    layer.dot_general = nnx.data(dot_general) if stateful else nnx.static(dot_general)
