"""The bipolar-INT number format: every bit is -1 or +1."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

MIN_BITS, MAX_BITS = 1, 8
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class BipolarFormat:
    """The grid of values that a number of 1 to 8 bits can take.

    This class alone defines the grid; all other code calls it. Bit b_i in {0, 1} stands for
    2 b_i - 1 in {-1, +1} and is multiplied by the weight p_i of its plane. Always:

    - code u = sum_i p_i b_i, an integer in 0 ... W, with W = sum_i p_i (`max_value`);
    - value v = sum_i p_i (2 b_i - 1) = 2 u - W, in -W ... W in steps of 2;
    - in the n-bit format p_i = 2^i and W = 2^n - 1: the values are the odd integers from
      -W to W, and zero is not one of them;
    - in the ternary format p = (1, 1) and W = 2: the values are -2, 0 and 2;
    - a real number w is approximated by scale * v.

    Source: arXiv 2409.17870, section 3.1 (n bits); BitNet b1.58, arXiv 2402.17764
    (ternary weights).

    Attributes:
      bits: number of planes, 1 to 8.
      ternary: the ternary format; both of its planes have the weight 1.
      span: of activations, the part of a token's range that the grid spans: numbers beyond it take its ends, all others
        get finer steps. At most 1; the formats of weights have 1.
      symmetric: of activations of 2 bits and more, whether every token has zero at the code `code_offset` and the step
        2 max|x| / W, whatever its smallest and largest number: signed integers without a zero point.

    Raises:
      ValueError: bits is not an integer in 1..8, or not 2 in the ternary format; a span that is not in (0, 1]; 1 bit or
        ternary as symmetric, which they are by themselves.
    """

    bits: int
    ternary: bool = False
    span: float = 1.0
    symmetric: bool = False

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | np.integer):
            raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {self.bits!r}")
        object.__setattr__(self, "bits", int(self.bits))
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {self.bits}")
        if self.ternary and self.bits != 2:
            raise ValueError(f"a ternary format has 2 planes, got bits={self.bits}: use bipolar_jax.TERNARY")
        if isinstance(self.span, bool) or not isinstance(self.span, float | int) or not 0 < self.span <= 1:
            raise ValueError(f"span must be a number above 0 and at most 1, got {self.span!r}")
        object.__setattr__(self, "span", float(self.span))
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.symmetric and (self.ternary or self.bits == 1):
            raise ValueError(f"numbers of {self.name} bits are symmetric by themselves: leave `symmetric` False")

    @functools.cached_property
    def plane_weights(self) -> tuple[int, ...]:
        """p_i of each plane, low plane first."""
        return (1, 1) if self.ternary else tuple(1 << i for i in range(self.bits))

    @property
    def max_value(self) -> int:
        """W, both the largest value and the largest code."""
        return sum(self.plane_weights)

    @property
    def code_offset(self) -> int:
        """z, subtracted from a code to get the signed code c = u - z, an int8: 2^(bits-1), or 1 for ternary."""
        return (self.max_value + 1) // 2

    @property
    def value_shift(self) -> int:
        """r in v = 2 c + r, c being the signed code: 1, or 0 for ternary."""
        return 2 * self.code_offset - self.max_value

    @property
    def name(self) -> str:
        """The format as `Precision` prints it: "4", or "1.58" for ternary."""
        return "1.58" if self.ternary else str(self.bits)

    def grid(self) -> np.ndarray:
        """The value of every code, int32 [max_value + 1]: index u holds 2 u - W."""
        return 2 * np.arange(self.max_value + 1, dtype=np.int32) - self.max_value

    def encode(self, x: Float[Array, "..."], half_steps_per_unit: Float[Array, "..."]) -> UInt8[Array, "..."]:
        """Codes of the values nearest to x / scale; clips x to the ends of the grid.

        For n bits u = floor(x / (2 scale)) + z, because the values are 2 scale apart. Codes of
        fewer bits are the high bits of these codes (nesting): doubling the scale is exact in
        floating point, and floor(floor(t) / 2) = floor(t / 2).

        Args:
          x: float32.
          half_steps_per_unit: 1 / (2 scale), broadcastable to x; 0 gives the code z (`code_offset`).

        Returns:
          uint8 codes, in x's shape.
        """
        if self.ternary:
            # Not floor(x * half_steps_per_unit + 0.5): compilers may fuse the product and the sum, which rounds
            # once instead of twice, and the codes would differ between programs.
            steps = x * half_steps_per_unit
            return (steps >= -0.5).astype(jnp.uint8) + (steps >= 0.5).astype(jnp.uint8)
        return self._clip(jnp.floor(x * half_steps_per_unit) + self.code_offset)

    def encode_around(
        self, zero_code: Integer[Array, "..."] | int, x: Float[Array, "..."], half_steps_per_unit: Float[Array, "..."]
    ) -> UInt8[Array, "..."]:
        """Codes on a grid that is shifted so that x = 0 has the code `zero_code`.

        A code stands for scale * (v - v0) with v0 = 2 zero_code - W, that is for scale * v plus
        the offset -scale * v0. Arguments and result as for `encode`.
        """
        return self._clip(jnp.floor(x * half_steps_per_unit + 0.5) + jnp.asarray(zero_code, jnp.float32))

    def _clip(self, codes: Float[Array, "..."]) -> UInt8[Array, "..."]:
        # Clips before the cast: casting a float that is out of the integer's range is undefined.
        return jnp.clip(codes, 0, self.max_value).astype(jnp.uint8)

    def values(self, codes: Integer[Array, "..."]) -> Integer[Array, "..."]:
        """v = 2 u - W as int32."""
        return 2 * codes.astype(jnp.int32) - self.max_value

    def signed_codes(self, codes: Integer[Array, "..."]) -> Integer[Array, "..."]:
        """c = u - z as int8, the operand of int8 tensor cores."""
        return (codes.astype(jnp.int32) - self.code_offset).astype(jnp.int8)

    def bit(self, codes: Integer[Array, "..."], plane: int) -> Integer[Array, "..."]:
        """b_i of every code for i = plane, 0 or 1 in the codes' dtype."""
        if self.ternary:
            return (codes > plane).astype(codes.dtype)
        return (codes >> plane) & 1

    def max_contraction(self, other: BipolarFormat) -> int:
        """Largest K for which a sum of K products of values of both formats fits int32."""
        return _INT32_MAX // (self.max_value * other.max_value)

    def truncate(self, bits: int) -> BipolarFormat:
        """The format of the `bits` highest planes.

        Raises:
          ValueError: bits outside 1 ... `self.bits`, or a ternary format, whose codes do not nest.
        """
        if self.ternary:
            raise ValueError(
                "a ternary format cannot be truncated, because its two planes have the same weight: quantize again"
            )
        shorter = BipolarFormat(bits)
        if shorter.bits > self.bits:
            raise ValueError(
                f"cannot truncate {self.bits} bits to {bits}: ask for at most {self.bits}, or quantize again"
            )
        return shorter


TERNARY = BipolarFormat(2, ternary=True)


def as_format(bits: int | BipolarFormat) -> BipolarFormat:
    """The n-bit format of weights of a number of bits; a `BipolarFormat` is returned unchanged.

    Raises:
      ValueError: as `BipolarFormat`, or a span or symmetric zeros, which only activations have.
    """
    if not isinstance(bits, BipolarFormat):
        return BipolarFormat(bits)
    if bits.span != 1:
        raise ValueError(f"weights have no span, got {bits.span}: their calibration chooses the grid")
    if bits.symmetric:
        raise ValueError('weights have no symmetric format: quantize them with the calibration "absmax"')
    return bits
