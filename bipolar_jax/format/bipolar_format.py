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
    """Grid of the values that a few bit planes can hold.

    The sole owner of the grid: everything else asks it. Bit b_i in {0, 1} of a number
    stands for 2 b_i - 1 in {-1, +1}, and counts with its plane's weight p_i. The
    following always hold:

    - code u = sum_i p_i b_i, an integer in 0 ... W, with W = sum_i p_i (`max_value`);
    - value v = sum_i p_i (2 b_i - 1) = 2 u - W, in -W ... W in steps of 2;
    - with p_i = 2^i (the n-bit format) W = 2^n - 1: the values are all odd integers up
      to W in magnitude, and there is no zero;
    - with p = (1, 1) (the ternary format) W = 2: the values are -2, 0 and 2;
    - a real number is w ~ scale * v.

    Source: arXiv 2409.17870, section 3.1 (n bits); BitNet b1.58, arXiv 2402.17764
    (ternary weights).

    Attributes:
      bits: number of planes, 1 to 8; the low one comes first.
      ternary: both of two planes weigh 1.

    Raises:
      ValueError: bits outside 1..8, or a ternary format of other than two planes.
    """

    bits: int
    ternary: bool = False

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | np.integer):
            raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {self.bits!r}")
        object.__setattr__(self, "bits", int(self.bits))
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {self.bits}")
        if self.ternary and self.bits != 2:
            raise ValueError(f"a ternary format has 2 planes, got bits={self.bits}: use bipolar_jax.TERNARY")

    @functools.cached_property
    def plane_weights(self) -> tuple[int, ...]:
        """Weight of each plane, low plane first."""
        return (1, 1) if self.ternary else tuple(1 << i for i in range(self.bits))

    @property
    def max_value(self) -> int:
        """W, the largest value; also the largest code."""
        return sum(self.plane_weights)

    @property
    def code_offset(self) -> int:
        """z such that the signed code c = u - z fits int8: 2^(bits-1), or 1 for ternary."""
        return (self.max_value + 1) // 2

    @property
    def value_shift(self) -> int:
        """r in {0, 1} such that v = 2 c + r, c being the signed code."""
        return 2 * self.code_offset - self.max_value

    @property
    def name(self) -> str:
        """The field's way to write it: "4", or "1.58" for ternary."""
        return "1.58" if self.ternary else str(self.bits)

    def grid(self) -> np.ndarray:
        """All values in increasing order, int32 [max_value + 1]; code u stands at index u."""
        return 2 * np.arange(self.max_value + 1, dtype=np.int32) - self.max_value

    def encode(self, x: Float[Array, "..."], half_steps_per_unit: Float[Array, "..."]) -> UInt8[Array, "..."]:
        """Codes of the values nearest to x * 2 * half_steps_per_unit.

        Works on halves of the grid's step, so that a floor finds the nearest odd
        integer, and the codes of fewer bits are the high bits of these (nesting): to
        halve the step is exact in floating point, and floors nest.

        Args:
          x: real numbers, float32.
          half_steps_per_unit: 1 / (2 scale), broadcastable to x; 0 encodes the middle.
        """
        if self.ternary:
            # Not by adding 0.5 and a floor: compilers round a product that is added to once or twice, as they please.
            steps = x * half_steps_per_unit
            return (steps >= -0.5).astype(jnp.uint8) + (steps >= 0.5).astype(jnp.uint8)
        return self._clip(jnp.floor(x * half_steps_per_unit) + self.code_offset)

    def encode_around(
        self, zero_code: Integer[Array, "..."] | int, x: Float[Array, "..."], half_steps_per_unit: Float[Array, "..."]
    ) -> UInt8[Array, "..."]:
        """Codes on the grid shifted so that x = 0 has the code `zero_code` exactly.

        The numbers are then scale * (v - v0) with v0 = 2 zero_code - W: an offset of -scale * v0.
        """
        return self._clip(jnp.floor(x * half_steps_per_unit + 0.5) + zero_code)

    def _clip(self, codes: Float[Array, "..."]) -> UInt8[Array, "..."]:
        # While still floating point: a cast of what an integer cannot hold is undefined.
        return jnp.clip(codes, 0, self.max_value).astype(jnp.uint8)

    def values(self, codes: Integer[Array, "..."]) -> Integer[Array, "..."]:
        """v = 2 u - W as int32."""
        return 2 * codes.astype(jnp.int32) - self.max_value

    def signed_codes(self, codes: Integer[Array, "..."]) -> Integer[Array, "..."]:
        """c = u - z as int8, what an int8 tensor core multiplies."""
        return (codes.astype(jnp.int32) - self.code_offset).astype(jnp.int8)

    def bit(self, codes: Integer[Array, "..."], plane: int) -> Integer[Array, "..."]:
        """Bit b_plane of every code, in the codes' dtype."""
        if self.ternary:
            return (codes > plane).astype(codes.dtype)
        return (codes >> plane) & 1

    def max_contraction(self, other: BipolarFormat) -> int:
        """Largest K for which the int32 sum of K products of values cannot overflow."""
        return _INT32_MAX // (self.max_value * other.max_value)

    def truncate(self, bits: int) -> BipolarFormat:
        """The format of the top `bits` planes.

        Raises:
          ValueError: more bits than there are, or a ternary format, whose planes do not nest.
        """
        if self.ternary:
            raise ValueError("a ternary format cannot be truncated: its two planes weigh the same; quantize anew")
        if bits > self.bits:
            raise ValueError(
                f"cannot truncate {self.bits} bits to {bits}: ask for at most {self.bits}, or quantize anew"
            )
        return BipolarFormat(bits)


TERNARY = BipolarFormat(2, ternary=True)


def as_format(bits: int | BipolarFormat) -> BipolarFormat:
    """A format from a number of bits, or as it is."""
    return bits if isinstance(bits, BipolarFormat) else BipolarFormat(bits)
