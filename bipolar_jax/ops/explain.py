"""Which kernel an operation would run, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.ops.dispatch import check_implementation, first_able
from bipolar_jax.ops.fused import planner, with_float_scales
from bipolar_jax.ops.matmul import check_operands
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.precision import activation_format


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backend that serves an operation.

    Attributes:
      implementation: name of the backend.
      kernel: what it runs, in words.
      tiling: the kernel's tile sizes and the like, if it has any to choose.
      reason: why this kernel and this tiling.
      passed_over: backends that refused before it, each with its reason.
    """

    implementation: str
    kernel: str
    tiling: Any
    reason: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.implementation}: {self.kernel} ({self.reason})"]
        if self.tiling is not None:
            lines.append(f"  {self.tiling}")
        lines += [f"  not {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


def explain(
    operation_or_x: Callable | Float[Array, "*batch k"],
    *operands: Any,
    implementation: str = "auto",
    **options: Any,
) -> Explanation:
    """What an operation would run for these operands on the default device; compiles and computes nothing.

    `explain(x, w, a_bits)` explains `matmul`. `explain(operation, *operands)` explains a fused operation of
    `bipolar_jax.ops.fused`. Arrays may be anything with their shape and dtype, such as `jax.ShapeDtypeStruct`.

    Args:
      operation_or_x: a fused operation, or `x` of `matmul`.
      *operands: of the fused operation; or `w` and `a_bits` of `matmul`.
      implementation: "auto", or a backend by name.
      **options: further operands, by name.

    Raises:
      TypeError: operands missing.
      ValueError: as the operation would; a function that is no fused operation.
      Unsupported: no backend that was tried serves the request; lists each one's reason.
    """
    check_implementation(implementation)
    if callable(operation_or_x):
        plan = planner(operation_or_x, implementation, operands, options)
        return _explanation(implementation, plan, operation_or_x.__name__)
    if len(operands) + len(options) < 2:
        raise TypeError("explain(x, w, a_bits) needs w and a_bits: a_bits=None leaves the activations float")
    return _explanation(implementation, _product_planner(operation_or_x, *operands, **options), "this product")


def _product_planner(x: Float[Array, "*batch k"], w: BipolarArray, a_bits: int | BipolarFormat | None) -> Callable:
    if not hasattr(x, "dtype"):
        raise ValueError(f"x must be an array, or a jax.ShapeDtypeStruct of its shape and dtype, got {x!r:.60}")
    a_format = None if a_bits is None else activation_format(a_bits)
    check_operands(x, w, a_format, None)
    w = with_float_scales(w, abstract=True)
    # Batch axes of w are mapped over; the other axes of x are rows.
    m = math.prod(x.shape[w.ndim - 2 : -1])
    return lambda backend: backend.plan_matmul(m, x.dtype, w, a_format)


def _explanation(implementation: str, call: Callable, operation: str) -> Explanation:
    plan, name, passed_over = first_able(implementation, call, operation)
    return Explanation(name, plan.kernel, plan.tiling, plan.reason, passed_over)
