"""Rules of qwix (`QuantizationRule`) to path rules of `quantize_model` (checked against qwix 0.1.8)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bipolar_jax.extras import require
from bipolar_jax.interop.qwix_arrays import qwix_bits
from bipolar_jax.quantize import Precision

if TYPE_CHECKING:
    import qwix

# The operations of layers with kernels; `dot` becomes a `dot_general`.
_PRODUCTS = frozenset({"dot_general", "einsum"})
_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")
# Of qwix.QtRule, which is a QuantizationRule too.
_OF_TRAINING = ("bwd_qtype", "disable_channelwise_axes", "additional_qt_config")


def rules_from_qwix(rules: Sequence[qwix.QuantizationRule]) -> list[tuple[str, Precision | None]]:
    """Rules for `quantize_model` and `quantization_aware` that choose the same layers and bits as qwix does.

    | qwix | here |
    | --- | --- |
    | `module_path`, which matches whole paths | a pattern of whole paths; the first match wins in both |
    | `weight_qtype`, None for float layers | bits; None |
    | `act_qtype` | bits of activations, on symmetric grids unless `act_calibration_method` is "minmax" |
    | `tile_size` | groups with float scales |
    | "absmax" or "minmax" of weights | "minmax": zero is on the grid of either, and it is at least as fine |
    | "absmax,F" or "minmax,F" of activations | `a_span` F |

    Weights are rounded by our calibration then; `from_qwix` keeps what qwix has rounded. Rules of other operations
    than products are left out, because they choose none of our layers. A rule that matches no layer, which qwix passes
    over, is an error of `quantize_model`.

    Args:
      rules: those that a provider, such as `qwix.PtqProvider`, is made with.

    Raises:
      ModuleNotFoundError: qwix is not installed.
      ValueError: a rule that has no counterpart, by its path: types of floats, static activations, other calibrations,
        tiles as a fraction, only one of the operations "dot_general" and "einsum", or gradients of a `qwix.QtRule`.
    """
    qwix = require("qwix", "peers")
    found = []
    for rule in rules:
        if not isinstance(rule, qwix.QuantizationRule):
            raise ValueError(f"rules_from_qwix takes qwix.QuantizationRule, got {type(rule).__name__}")
        chosen = _PRODUCTS & set(rule.op_names) if rule.op_names else _PRODUCTS
        if not chosen:
            continue
        try:
            if chosen != _PRODUCTS:
                raise ValueError(f"it is one of {min(chosen)} alone, and layers here do not differ in that: name both")
            found.append((_pattern(rule.module_path), _precision(rule)))
        except ValueError as error:
            raise ValueError(f"qwix's rule of module_path {rule.module_path!r:.200}: {error}") from error
    return found


def _pattern(module_path: str) -> str:
    if _FLAGS.match(module_path):
        raise ValueError("flags for the whole expression cannot be kept: write them as (?i:...)")
    return rf"\A(?:{module_path})\Z"


def _precision(rule: qwix.QuantizationRule) -> Precision | None:
    if found := [name for name in _OF_TRAINING if getattr(rule, name, None)]:
        raise ValueError(
            f"{found[0]} is {getattr(rule, found[0])!s:.60}, and rules here say nothing of gradients: leave it out and "
            "give quantization_aware a GradientPrecision"
        )
    if rule.weight_qtype is None:
        return None
    bits, group_size = qwix_bits(rule.weight_qtype), rule.tile_size
    if group_size is not None and not isinstance(group_size, int):
        raise ValueError(f"tile_size is the fraction {group_size}: give the number of weights of a tile")
    method, factor = _calibration(rule.weight_calibration_method, "weight_calibration_method")
    if factor != 1:
        raise ValueError(f'weights are clipped by {method!r},{factor:g}: use the calibration "mse" of a rule here')
    precision = {"w_bits": bits, "group_size": group_size, "calibration": "minmax", "scales": "float"}
    if rule.act_qtype is None:
        return Precision(**precision)
    if rule.act_static_scale:
        raise ValueError("act_static_scale: scales of activations are of each token here, so leave it False")
    method, factor = _calibration(rule.act_calibration_method or "absmax", "act_calibration_method")
    a_bits = qwix_bits(rule.act_qtype)
    return Precision(**precision, a_bits=a_bits, a_span=factor, a_symmetric=method == "absmax" and a_bits > 1)


def _calibration(text: str, name: str) -> tuple[str, float]:
    """The method and its factor. Raises ValueError for others than "absmax" and "minmax"."""
    method, *factor = text.lower().split(",")
    if method not in ("absmax", "minmax") or len(factor) > 1:
        raise ValueError(f"{name} is {text!r:.60}, which has no counterpart: absmax and minmax do")
    return method, float(factor[0]) if factor else 1.0
