"""Prepares a float model for quantization-aware training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bipolar_jax.nn.convert.float_layers import float_layers, warn_of_float_layers
from bipolar_jax.nn.convert.layer_paths import class_name, first_references, layer_references, other_layers
from bipolar_jax.nn.convert.rules import Rules, match_rules
from bipolar_jax.nn.layers.dense_layout import folded_kernel
from bipolar_jax.nn.layers.einsum import folded_einsum_kernel
from bipolar_jax.nn.training.dot_general import DotGeneral
from bipolar_jax.nn.training.layer_quantization import LayerQuantization
from bipolar_jax.nn.training.quantized_einsum import QuantizedEinsum, StatefulEinsum
from bipolar_jax.nn.training.stateful_dot_general import StatefulDotGeneral
from bipolar_jax.ops import GradientPrecision

_DENSE = (nnx.Linear, nnx.LinearGeneral)
_LAYERS = (*_DENSE, nnx.Einsum)
_ELIGIBLE = "nnx.Linear, nnx.LinearGeneral or nnx.Einsum that plainly contracts its kernel"


def quantization_aware[Model: nnx.Module](
    model: Model, rules: Rules, *, learned_steps: bool = False, rngs: nnx.Rngs | None = None, **options: Any
) -> Model:
    """Copies a model and makes its layers multiply by `DotGeneral`, for quantization-aware training.

    The parameters stay float and are shared with the model. Train the copy with any optimizer,
    then pack it with `quantize_model(copy)`. To change the bits during training, call this again
    with other rules; learned step sizes then start from their initial values.

    Args:
      model: any NNX module; it is not changed.
      rules: as for `quantize_model`; they apply to `nnx.Linear`, `nnx.LinearGeneral`, which
        includes the projections of `nnx.MultiHeadAttention`, and `nnx.Einsum` that plainly contracts
        its kernel. Precision None makes a layer float again.
      learned_steps: True gives each layer step sizes that are trained with it (LSQ, see
        `StatefulDotGeneral`) instead of calibrated scales.
      rngs: required for quantized gradients, `gradient=GradientPrecision(bits=8)`.
      options: further attributes of `DotGeneral`, the same for all layers.

    Returns:
      A model of the same class.

    Raises:
      ValueError: a linen model, whose layers take a `DotGeneral` themselves; a layer by itself; rules as in
        `quantize_model`, or options that `DotGeneral` refuses; quantized gradients without `rngs`.

    Warns:
      UserWarning: as `quantize_model`; embeddings stay float in training and are not warned of.
    """
    if not isinstance(model, nnx.Module) or type(model) in _LAYERS:
        raise ValueError(
            f"got a {type(model).__name__}: give an nnx.Module with paths for rules to match; a layer by itself, or "
            "of a linen model, is trained with its argument dot_general=bipolar_jax.DotGeneral(...)"
        )
    gradient = options.get("gradient")
    if isinstance(gradient, GradientPrecision) and gradient.bits is not None and rngs is None:
        raise ValueError(
            f"gradients of {gradient.bits} bits are rounded stochastically: give rngs, such as nnx.Rngs(0)"
        )
    trained = nnx.clone(model)
    # A foreign dot_general of a dense layer is replaced.
    left_float = [x for x in float_layers(trained) if x.reason is not None and type(x.layer) not in _DENSE]
    left_ids = {id(each.layer) for each in left_float}
    references = [r for r in layer_references(trained, _LAYERS) if id(r.layer) not in left_ids]
    layers = {reference.path: reference.layer for reference in first_references(references).values()}
    others = {r.path: class_name(r.layer, _LAYERS) for r in other_layers(trained, _LAYERS)}
    others |= {each.path: each.reason for each in left_float}
    all_paths = [reference.path for reference in references]
    precisions = match_rules(rules, list(layers), others, _ELIGIBLE, all_paths)
    for path, precision in precisions.items():
        set_op = _set_einsum if isinstance(layers[path], nnx.Einsum) else _set_dot_general
        set_op(layers[path], precision, learned_steps, rngs, options)
    warn_of_float_layers(rules, left_float)
    return trained


def _set_einsum(layer, precision, learned_steps, rngs, options) -> None:
    """Makes a layer contract at a precision, or with `jnp.einsum` for None."""
    if precision is None:
        layer.einsum_op = nnx.static(jnp.einsum)
    elif learned_steps or rngs is not None:
        dot_general = DotGeneral.of(precision, **options)
        kernel = folded_einsum_kernel(layer)
        stateful = StatefulDotGeneral(dot_general, kernel, learned_steps=learned_steps, rngs=rngs)
        layer.einsum_op = nnx.data(StatefulEinsum(stateful))
    else:
        layer.einsum_op = nnx.static(QuantizedEinsum(DotGeneral.of(precision, **options)))


def _set_dot_general(layer, precision, learned_steps, rngs, options) -> None:
    """Makes a layer multiply at a precision, or with `lax.dot_general` for None."""
    if precision is None and LayerQuantization.of(layer) is None:
        return  # keeps a dot_general of the caller's
    if isinstance(layer, nnx.LinearGeneral):
        layer.dot_general_cls = None  # it would take precedence over dot_general
    if precision is None:
        layer.dot_general = nnx.static(jax.lax.dot_general)
        return
    dot_general = DotGeneral.of(precision, **options)
    stateful = learned_steps or rngs is not None
    if stateful:
        kernel = folded_kernel(layer, layer.kernel[...])
        dot_general = StatefulDotGeneral(dot_general, kernel, learned_steps=learned_steps, rngs=rngs)
    # Flax treats dot_general as static unless told otherwise; a module with variables is data.
    layer.dot_general = nnx.data(dot_general) if stateful else nnx.static(dot_general)
