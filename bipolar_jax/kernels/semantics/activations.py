"""Per-token quantization of activations: the numbers every backend's quantizer must give.

A token's numbers are x ~ scale * (v - v0) with v on the bipolar grid, which spans from
the token's smallest number to its largest and has zero on it (`spanning_grid`): an offset
of -scale * v0 for each token, and one more term in the epilogue. On the plain odd grid,
which has no zero, tokens with outliers would lose all their small numbers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Prologue
from bipolar_jax.quantize.calibration import half_steps_per_unit, spanning_grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTokens:
    """Activations ~ scale * (value - zero_value), one scale and zero for each row.

    Attributes:
      codes: unsigned codes.
      scale: float32; 0 for rows of zeros, NaN or Inf for rows that hold any.
      zero_value: the value v0 that stands for zero, 0 for the symmetric grid of one bit.
    """

    codes: UInt8[Array, "m k"]
    scale: Float[Array, " m"]
    zero_value: Int[Array, " m"]

    def dequantize(self, a_format: BipolarFormat) -> Float[Array, "m k"]:
        """What the codes stand for, float32."""
        steps = a_format.values(self.codes) - self.zero_value[:, None]
        return steps.astype(jnp.float32) * self.scale[:, None]


def quantize_tokens(
    x: Float[Array, "m columns"], a_format: BipolarFormat, prologue: Prologue | None = None
) -> QuantizedTokens:
    """Rounds every row, after what the prologue does to it, to nearest on a grid that its extremes span."""
    x = x.astype(jnp.float32) if prologue is None else prologue(x)
    scale, zero_value = spanning_grid(x, a_format)
    # Steps from zero, whose value is v0: the nearest value is v0 + 2 round(x / (2 scale)).
    half_steps = half_steps_per_unit(scale)[:, None]
    if a_format.bits == 1:
        codes = a_format.encode(x, half_steps)
    else:
        zero_code = (zero_value + a_format.max_value) // 2
        codes = a_format.encode_around(zero_code[:, None], x, half_steps)
    return QuantizedTokens(codes, scale, zero_value)
