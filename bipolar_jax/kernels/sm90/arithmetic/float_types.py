"""16-bit floating-point types as kernels make them from integers."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FloatType:
    """A 16-bit floating-point type.

    Attributes:
      name: in PTX, "bf16" or "f16".
      base: B, the power of two whose last place is 1.
      base_bits: the bits of B.
      one_bits: the bits of 1.
      lowest: the last place of subnormal numbers: a word of bits below 256 is so many times it.
      lift: the power of two with which products of 8-bit integers, one of them a subnormal number, and their sums with
        others are normal numbers: the largest that scales below 128 leave finite.
    """

    name: str
    base: int
    base_bits: int
    one_bits: int
    lowest: float
    lift: float

    @property
    def dtype(self) -> jnp.dtype:
        """As JAX has it."""
        return jnp.dtype(jnp.bfloat16 if self.name == "bf16" else jnp.float16)

    def bits_of(self, number: float) -> int:
        """The bits of a number, which must be exact in this type."""
        if number == 0:
            return 0
        sign, magnitude, exponent = int(number < 0), abs(number), 0
        mantissa_bits = self.base.bit_length() - 1
        if magnitude < self.lowest * (1 << mantissa_bits):
            assert magnitude % self.lowest == 0, f"{number} is not exact in {self.name}"
            return (sign << 15) + int(magnitude / self.lowest)
        while magnitude >= 2:
            magnitude, exponent = magnitude / 2, exponent + 1
        while magnitude < 1:
            magnitude, exponent = magnitude * 2, exponent - 1
        mantissa = (magnitude - 1) * (1 << mantissa_bits)
        assert mantissa == int(mantissa), f"{number} is not exact in {self.name}"
        return (sign << 15) + self.one_bits + (exponent << mantissa_bits) + int(mantissa)


BF16 = FloatType("bf16", 128, 0x4300, 0x3F80, 2.0**-133, 2.0**120)
F16 = FloatType("f16", 1024, 0x6400, 0x3C00, 2.0**-24, 2.0**5)
FLOATS = {float_type.name: float_type for float_type in (BF16, F16)}
