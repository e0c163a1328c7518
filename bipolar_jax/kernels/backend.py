"""What every backend offers."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray


class Backend(Protocol):
    """Matrix products with a packed right operand of logical shape [k, n]; what is summed is integers."""

    def integer_matmul(
        self, codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat
    ) -> Int[Array, "m n groups"]:
        """sum over the k of each group of value(codes) * value(w), exact in int32."""

    def quantized_matmul(
        self,
        x: Float[Array, "m k"],
        w: BipolarArray,
        a_format: BipolarFormat,
        bias: Float[Array, " n"] | None,
    ) -> Float[Array, "m n"]:
        """Quantizes x as `activations.quantize_tokens`, multiplies integers, scales; output in x's dtype."""

    def weight_only_matmul(
        self, x: Float[Array, "m k"], w: BipolarArray, bias: Float[Array, " n"] | None
    ) -> Float[Array, "m n"]:
        """x times the dequantized w, accumulated in float32; output in x's dtype."""
