"""From the integer sums of the tensor cores to the product of values: which planes are multiplied, which terms follow.

With codes u, values v = 2 u - W, a token's zero code z (activations ~ scale * 2 (u - z)), sums
U of codes over the true K and V_w = 2 U_w - W K, half of the number that a token's scale multiplies is

    planes:  P = sum_k u_a u_w = sum_ij p_i q_j popc(A_i & W_j)
             sum_k (u_a - z) v_w = 2 P - W U_a - z V_w
    bytes:   c = u - o, o the code offset, so that v_a = 2 c_a + 1; w as its values
             T = sum_k c_a v_w      sum_k (u_a - z) v_w = T - (z - o) V_w
             or, where values do not fit a byte (8 bits), as codes, v_w = 2 c_w + 1
             S = sum_k c_a c_w      sum_k (u_a - z) v_w = 2 S + C_a - (z - o) V_w.

One-bit activations and integer products have no zero; with v_a = 2 u_a - A = 2 c_a + 1,

    sum_k v_a v_w = 4 P - 2 W U_a - A V_w  =  2 T + V_w  =  4 S + 2 C_a + V_w.

All are acc * product_weight + row_term(U_a) + column_weight(z) * V_w, exact modulo 2^32. The total
is at most K A W, which fits (`BipolarFormat.max_contraction`). Padding with zero bits or bytes adds nothing.

Plane weights are powers of two, so P is summed by Horner's rule in one accumulator: the pairs of
largest weight first, over all of K; then the accumulator is doubled and the next pairs follow. One
accumulator for every weight (a + w - 1 of them, as in arXiv 2409.17870) leaves tiles so small that
loads bind; with one accumulator every precision has the tiles of W1A1.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind

_FLOAT32_EXACT = 1 << 24


def holds_values(w_format: BipolarFormat) -> bool:
    """Whether a signed byte holds every value of the format."""
    return w_format.max_value <= 127


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How the product of two formats is recovered from integer sums; all static.

    Attributes:
      kind: the operands: bit planes ("planes") or bytes ("int8").
      a_format: grid of the activations.
      w_format: grid of the weights.
      k: the true contracted size.
      with_zero: whether tokens have a zero code (the half product), or not.
    """

    kind: OperandKind
    a_format: BipolarFormat
    w_format: BipolarFormat
    k: int
    with_zero: bool

    def pair_groups(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Pairs of planes (i of x, j of w) by weight, in the order of Horner's rule.

        Returns:
          (factor, pairs): the accumulator is multiplied by `factor`, then the pairs are added.
        """
        if self.kind == "int8":
            return [(1, [(0, 0)])]
        weighted = sorted(
            ((p * q).bit_length() - 1, (i, j))
            for (i, p), (j, q) in itertools.product(
                enumerate(self.a_format.plane_weights), enumerate(self.w_format.plane_weights)
            )
        )
        groups, previous = [], None
        for exponent, members in itertools.groupby(reversed(weighted), key=lambda item: item[0]):
            groups.append((1 if previous is None else 1 << (previous - exponent), [pair for _, pair in members]))
            previous = exponent
        assert previous == 0  # plane weights begin at 1
        return groups

    @property
    def num_pairs(self) -> int:
        """Passes of the mainloop over K."""
        return sum(len(pairs) for _, pairs in self.pair_groups())

    @property
    def w_as_values(self) -> bool:
        """Whether the bytes of w are values, not codes."""
        return holds_values(self.w_format)

    @property
    def product_weight(self) -> int:
        """The factor of the accumulator."""
        half = 1 if self.kind == "int8" and self.w_as_values else 2
        return half if self.with_zero else 2 * half

    def row_term(self, code_sums):
        """The term of a token, from the sum U_a of its codes."""
        if self.kind == "planes":
            half = -self.w_format.max_value * code_sums
        elif self.w_as_values:
            half = 0 * code_sums
        else:
            half = code_sums - self.a_format.code_offset * self.k
        return half if self.with_zero else 2 * half

    def column_weight(self, zero_code):
        """A token's factor of the columns' value sums V_w."""
        if self.with_zero:
            return (self.a_format.code_offset if self.kind == "int8" else 0) - zero_code
        return 0 * zero_code + (1 if self.kind == "int8" else -self.a_format.max_value)

    def column_value_sums(self, code_sums):
        """V_w from the sums of a column's codes."""
        return 2 * code_sums - self.w_format.max_value * self.k

    def token_value_sums(self, code_sums, zero_code, length=None):
        """V_x - v0 L of a token over `length` (or all) elements, half of it `with_zero`: the factor of offsets."""
        length = self.k if length is None else length
        if self.with_zero:
            return code_sums - length * zero_code
        return 2 * code_sums - self.a_format.max_value * length

    @property
    def scale_factor(self) -> float:
        """The factor of a token's scale: 2 where the product was halved."""
        return 2.0 if self.with_zero else 1.0

    @property
    def fits_float32(self) -> bool:
        """Whether float32 holds every partial sum of the correction exactly.

        The terms are at most 4 P, 2 W U_a and (A + 1) V_w, each at most 4 (A + 1) W K, and sums of two at most twice
        that.
        """
        return 8 * (self.a_format.max_value + 1) * self.w_format.max_value * self.k < _FLOAT32_EXACT


@dataclasses.dataclass(frozen=True)
class FloatRecovery:
    """A product of float activations with the integer values of weights as floats: the sums are the product.

    Attributes:
      kind: of the floats, "bf16" or "f16".
      k: the true contracted size.
      unit: what a product of 1 adds to sums, a power of two.
    """

    kind: OperandKind
    k: int
    unit: float = dataclasses.field(default=1.0, kw_only=True)
    num_pairs: ClassVar[int] = 1

    def pair_groups(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """As in `Recovery`."""
        return [(1, [(0, 0)])]
