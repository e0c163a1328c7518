"""Quantization of activations, token by token: the numbers that the quantizer of every backend gives.

A token's numbers are x ~ scale * (v - v0) with v on the bipolar grid. The grid spans from the token's smallest number
to its largest and contains zero (`quantize.calibration.spanning_grid`), at the cost of one term in the epilogue for v0.
The plain odd grid has no zero: where an outlier sets the scale, all small numbers of the token would become +-scale.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.quantize.calibration import grid_between, half_steps_per_unit, row_extremes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTokens:
    """Activations ~ scale * (value(codes) - zero_value), with one scale and one zero for each row.

    Attributes:
      codes: unsigned codes.
      scale: float32; 0 for rows of zeros, NaN or Inf for rows that contain such numbers.
      zero_value: int32; the value v0 that stands for zero. It is 0 on the symmetric grid of one bit.
    """

    codes: UInt8[Array, "m k"]
    scale: Float[Array, " m"]
    zero_value: Int[Array, " m"]

    def dequantize(self, a_format: BipolarFormat) -> Float[Array, "m k"]:
        """The numbers that the codes stand for, float32."""
        steps = a_format.values(self.codes) - self.zero_value[:, None]
        return steps.astype(jnp.float32) * self.scale[:, None]


def quantize_tokens(
    x: Float[Array, "m columns"], a_format: BipolarFormat, prologue: Prologue | None = None
) -> QuantizedTokens:
    """Rounds every row of prologue(x) to nearest, on the grid that the row's extremes and zero span.

    Args:
      x: bfloat16, float16 or float32; computed in float32.
      a_format: the grid, 1 to 8 bits.
      prologue: see `semantics.prologue`; None quantizes x itself.
    """
    x = x.astype(jnp.float32) if prologue is None else prologue(x)
    return tokens_between(x, *row_extremes(x), a_format)


def tokens_between(
    x: Float[Array, "m k"], low: Float[Array, " m"], high: Float[Array, " m"], a_format: BipolarFormat
) -> QuantizedTokens:
    """The tokens of `quantize_tokens`, or a part of their k: `low` and `high` are the `row_extremes` of whole rows."""
    scale, zero_value = grid_between(low, high, a_format)
    # Zero has the value v0 and values are 2 apart, so the nearest value is v0 + 2 round(x / (2 scale)).
    half_steps = half_steps_per_unit(scale)[:, None]
    if a_format.bits == 1:
        codes = a_format.encode(x, half_steps)
    else:
        zero_code = (zero_value + a_format.max_value) // 2
        codes = a_format.encode_around(zero_code[:, None], x, half_steps)
    return QuantizedTokens(codes, scale, zero_value)
