"""From plane products to the product of values: which planes are multiplied, and the terms that complete them.

With codes u, values v = 2 u - W and a token's zero code z (activations ~ scale * 2 (u - z)),
a mainloop sums P, and the half product follows from sums of codes, which are made once:

    binary:  P = sum_k u_a u_w           sum_k (u_a - z) v_w = 2 P - W U_a - z V_w
    int8:    S = sum_k c_a c_w           sum_k (u_a - z) v_w = 2 S + r C_a - (z - o) V_w

where u = c + o (o = code_offset), v_w = 2 c_w + r, U and C sum u and c over the true K and
V_w = 2 U_w - W K. One-bit activations and integer products have no zero, v_a = 2 u_a - A:

    binary:  sum_k v_a v_w = 4 P - 2 W U_a - A V_w
    int8:    sum_k v_a v_w = 4 S + 2 r C_a + r_a V_w

All are acc * product_weight + row_term(U_a) + column_weight(z) * V_w, exact modulo 2^32.
What it must hold: |half product| <= K A W < 2^31 (`BipolarFormat.max_contraction`).

P = sum_ij p_i q_j popc(A_i & W_j), the plane weights being powers of two, is summed by
Horner's rule in one accumulator: the pairs of largest weight first, over all of K; then the
accumulator is doubled and the next ones follow. Kernels in the literature keep an accumulator for
every weight (a + w - 1 of them), which leaves tiles so small that loads bind. Here any
precision has the tiles of W1A1.
"""

from __future__ import annotations

import dataclasses
import itertools

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.tensor_core import OperandKind


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How the product of two formats is put together again; all static.

    Attributes:
      kind: binary planes or int8 codes.
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
          (shift, pairs): the accumulator is shifted left by `shift`, then the pairs are added.
        """
        if self.kind == "s8":
            return [(0, [(0, 0)])]
        weighted = sorted(
            (
                (p * q).bit_length() - 1,
                (i, j),
            )
            for (i, p), (j, q) in itertools.product(
                enumerate(self.a_format.plane_weights), enumerate(self.w_format.plane_weights)
            )
        )
        groups, previous = [], None
        for log2, members in itertools.groupby(reversed(weighted), key=lambda item: item[0]):
            groups.append((0 if previous is None else previous - log2, [pair for _, pair in members]))
            previous = log2
        assert previous == 0  # plane weights begin at 1
        return groups

    @property
    def num_pairs(self) -> int:
        return sum(len(pairs) for _, pairs in self.pair_groups())

    @property
    def product_weight(self) -> int:
        """What multiplies the accumulator."""
        return 2 if self.with_zero else 4

    def row_term(self, code_sums):
        """The term of a token, from the sum U_a of its codes."""
        if self.kind == "b1":
            half = -self.w_format.max_value * code_sums
        else:
            half = self.w_format.value_shift * (code_sums - self.a_format.code_offset * self.k)
        return half if self.with_zero else 2 * half

    def column_weight(self, zero_code):
        """What a token multiplies the columns' value sums V_w with."""
        if self.with_zero:
            return (self.a_format.code_offset if self.kind == "s8" else 0) - zero_code
        constant = self.a_format.value_shift if self.kind == "s8" else -self.a_format.max_value
        return 0 * zero_code + constant

    def value_sums(self, code_sums):
        """V_w from the sums of a column's codes."""
        return 2 * code_sums - self.w_format.max_value * self.k

    def token_value_sums(self, code_sums, zero_code):
        """V_x - v0 K of a token (half of it `with_zero`), what offsets of weights multiply."""
        if self.with_zero:
            return code_sums - self.k * zero_code
        return 2 * code_sums - self.a_format.max_value * self.k

    @property
    def fits_float32(self) -> bool:
        """Whether every partial sum of the correction is an integer that float32 holds exactly.

        They are at most 4 P, 2 W U_a and (A + 1) V_w in magnitude, each of them below
        4 (A + 1) W K, and so are their sums below twice that.
        """
        return self.kind == "b1" and 8 * (self.a_format.max_value + 1) * self.w_format.max_value * self.k < 1 << 24

    @property
    def scale_factor(self) -> float:
        """Halves what `with_zero` halved: the factor of a token's scale."""
        return 2.0 if self.with_zero else 1.0
