"""What a product would run, and why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxtyping import Array, Float

from bipolar_jax.ops.dispatch import check_implementation, first_able
from bipolar_jax.ops.matmul import check_operands
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.precision import activation_format


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a product.

    Attributes:
      implementation: the backend's name.
      kernel: what it runs.
      tiling: the kernel's tiles, if it has any to choose.
      reason: why these.
      passed_over: backends tried before, with what each could not do.
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
    x: Float[Array, "*batch k"], w: BipolarArray, a_bits: int | None, *, implementation: str = "auto"
) -> Explanation:
    """What `matmul` would run for these operands on the default device; computes nothing.

    Args:
      x: an array or anything with its shape and dtype.
      w: as for `matmul`.
      a_bits: likewise.
      implementation: likewise.

    Raises:
      ValueError: as `matmul` would.
      Unsupported: no backend that was tried can serve the product; lists each one's reason.
    """
    check_implementation(implementation)
    a_format = None if a_bits is None else activation_format(a_bits)
    check_operands(x, w, a_format, None)
    # Batch axes of w are mapped over; the rest of x's are rows.
    m = math.prod(x.shape[w.ndim - 2 : -1])
    plan, name, passed_over = first_able(implementation, lambda backend: backend.plan_matmul(m, x.dtype, w, a_format))
    return Explanation(name, plan.kernel, plan.tiling, plan.reason, passed_over)
