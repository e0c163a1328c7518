"""From sums of expanded bytes to the product of values.

With bytes b = s * u + o + 128 of weights, or b = u without groups, signed codes c = u_a - o_a of activations (o_a the
code offset), their zero code z, sums U_a of codes over the true K, and T = sum_k c b,

    groups:  w = b - 128,   sum_k (u_a - z) w = T - 128 (U_a - o_a K) + (o_a - z) W,     W = sum_k w over the true K
    none:    v = 2 b - V,   sum_k (u_a - z) v = 2 T - V (U_a - o_a K) + (o_a - z) V_w,   V_w = 2 U_w - V K.

All is exact modulo 2^32. Padding adds nothing: there c = 0. One-bit activations and integer products have no zero; with
v_a = 2 u_a - A the sums are twice those of z = A / 2. The terms are those of `arithmetic.recovery`, which the epilogue
applies.
"""

from __future__ import annotations

import dataclasses

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery, Recovery
from bipolar_jax.kernels.sm90.gemm_expanded.scaled_multiply import SUM_UNIT
from bipolar_jax.packing.fields import OFFSET_BIAS
from bipolar_jax.quantize.integer_groups import max_contraction

_FLOAT32_EXACT = 2**24
_LARGEST_BYTE = 255


@dataclasses.dataclass(frozen=True)
class ExpandedRecovery(Recovery):
    """`Recovery` of products of expanded bytes; kind is "int8".

    Attributes:
      grouped: whether weights are s * u + o of integer groups; then `ColumnTerms.code_sums` are the sums W.
      unsigned: whether c are the codes u_a themselves, so that o_a is 0 above.
    """

    grouped: bool = False
    unsigned: bool = False

    @property
    def _code_offset(self) -> int:
        return 0 if self.unsigned else self.a_format.code_offset

    @property
    def most_elements(self) -> int:
        """The largest K whose products of values fit int32."""
        if self.grouped:
            return max_contraction(self.a_format)
        return self.w_format.max_contraction(self.a_format)

    @property
    def product_weight(self) -> int:
        return (1 if self.grouped else 2) * (1 if self.with_zero else 2)

    def row_term(self, code_sums):
        bias = OFFSET_BIAS if self.grouped else self.w_format.max_value
        return -bias * (1 if self.with_zero else 2) * (code_sums - self._code_offset * self.k)

    def column_weight(self, zero_code):
        if self.with_zero:
            return self._code_offset - zero_code
        return 0 * zero_code + (2 * self._code_offset - self.a_format.max_value)

    def column_value_sums(self, code_sums):
        return code_sums if self.grouped else super().column_value_sums(code_sums)

    @property
    def fits_float32(self) -> bool:
        """Whether float32 holds every partial sum of the correction exactly.

        Each of its three terms is at most product_weight * 256 * (A + 1) * K, and sums of two at most twice that.
        """
        return 4 * self.product_weight * (_LARGEST_BYTE + 1) * (self.a_format.max_value + 1) * self.k < _FLOAT32_EXACT


@dataclasses.dataclass(frozen=True)
class ScaledRecovery(Recovery):
    """`Recovery` of the scaled sums of `scaled_multiply`, for `scaled_epilogue.finish_scaled_transposed`.

    With numbers y of a column, N their sum and u_a unsigned codes, sum_k (u_a - z) y = sum_k u_a y - z N. Without a
    zero z is A / 2, and the sums are twice that.
    """

    grouped: bool = True

    @property
    def product_weight(self) -> float:
        return SUM_UNIT * (1 if self.with_zero else 2)

    def column_weight(self, zero_code):
        return -zero_code if self.with_zero else 0 * zero_code - self.a_format.max_value


@dataclasses.dataclass(frozen=True)
class ExpandedFloatRecovery(FloatRecovery):
    """`FloatRecovery` of products of weights that are expanded to 16-bit floats (`floats`).

    Attributes:
      w_format: of the weights' codes.
      grouped: whether weights are s * u + o of integer groups, or S * u + o of float groups below a power of two.
      rounds_product: whether an activation takes the product as the output's dtype rounds it, as of float activations.
    """

    w_format: BipolarFormat
    grouped: bool
    rounds_product: bool = False
