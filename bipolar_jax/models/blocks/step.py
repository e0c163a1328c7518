"""What one step of a model would run, for `inference.explain`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.nn import Embed, Linear
from bipolar_jax.ops import Explanation, explain


@dataclasses.dataclass(frozen=True)
class Step:
    """One or several fused operations of a model.

    Attributes:
      name: of the products or of attention, such as "qkv" or "gate/up".
      runs: backend, kernel and reason.
      not_fused: why the kernel that fuses this step with the next ones is not taken; None if it is, or none exists.
    """

    name: str
    runs: Explanation
    not_fused: str | None = None


def shared_implementation(layers: Iterable[Linear]) -> str:
    """The backend that an operation which fuses several layers is asked of: the one they name, else "auto".

    Raises:
      Unsupported: layers that name different backends.
    """
    named = sorted({layer.implementation for layer in layers} - {"auto"})
    if len(named) > 1:
        raise Unsupported(f"layers of one fused operation need one backend, not {' and '.join(named)}")
    return named[0] if named else "auto"


def by_xla(kernel: str, reason: str, passed_over: dict[str, str] | None = None) -> Explanation:
    """A step that is left to XLA."""
    return Explanation("xla", kernel, None, reason, passed_over or {})


def product_step(name: str, layer: nnx.Module, x: Any, not_fused: str | None = None) -> Step:
    """The product of a linear layer, or of an embedding that makes logits.

    Args:
      name: of the step.
      layer: packed or float.
      x: array or its shape and dtype; its last axis may be any.
      not_fused: see `Step`.
    """
    if isinstance(layer, Linear | Embed):
        w = layer.embedding.get_value().T if isinstance(layer, Embed) else layer.kernel.get_value()
        k_axes, token_axes = (getattr(layer, name, None) for name in ("k_axes", "token_axes"))
        tokens = math.prod(x.shape[:-1]) * (1 if token_axes is None else jax.lax.axis_size(token_axes))
        rows = jax.ShapeDtypeStruct((tokens, w.shape[-2]), x.dtype)
        # A device may have one group of several.
        has_groups = w.num_groups > 1 or (k_axes is not None and w.group_size is not None)
        has_scaled_sums = has_groups and not w.has_integer_groups and layer.precision.a_bits is not None
        if k_axes is not None:
            added = "added" if token_axes is None else "added and divided by tokens"
            scaled = "after" if has_scaled_sums else "before"
            not_fused = (
                f"devices of {k_axes} find each token's extremes first, and its sums are {added} {scaled} scales"
            )
        elif token_axes is not None:
            not_fused = f"tokens are quantized where they are, and devices of {token_axes} gather their codes"
        if getattr(layer, "order", None) is not None:
            not_fused = "its inputs are gathered first, in the order of their groups"
        if has_scaled_sums and (k_axes is not None or token_axes is not None):
            runs = by_xla("int8 dots of groups", "no kernel gives sums of float groups where k or tokens are cut")
        else:
            runs = explain(rows, w, layer.precision.a_format, implementation=layer.implementation)
        return Step(name, runs, not_fused)
    dtype = jnp.dtype(layer.dtype or x.dtype).name
    return Step(name, by_xla(f"{dtype} dot", "the layer is not packed"), not_fused)


def post_norm_step(name: str) -> Step:
    """The norm of what a product puts out, and the sum with the residual stream."""
    return Step(f"norm of {name}, sum", by_xla("elementwise kernels", "the norm needs all numbers of the product"))
