"""Keys and values in bipolar-INT: 8 or 4 bits a number, with a scale and a zero for each vector of a head."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens

CACHE_BITS = (8, 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedHeads:
    """Vectors of `head_dim` numbers, each quantized to a grid that its extremes and zero span. These always hold:

    - number[..., d] = 2 * scale[...] * (code[..., d] - zero[...]); so 0 is on the grid, with the code `zero`;
    - a number differs from its original by at most half a step, which is `scale`, and by float32 rounding;
    - with 8 bits, byte d is the code of element d; with 4 bits, the lower half of byte d is the code of element d, and
      the upper half that of element d + head_dim / 2.

    Attributes:
      codes: bytes.
      scale: float32, half a step; 0 for vectors of zeros, NaN or Inf for vectors that contain such numbers.
      zero: the code of 0.
      bits: 8 or 4.
    """

    codes: UInt8[Array, "*vectors bytes"]
    scale: Float[Array, "*vectors"]
    zero: UInt8[Array, "*vectors"]
    bits: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def quantize(cls, heads: Float[Array, "*vectors head_dim"], bits: int) -> QuantizedHeads:
        """Rounds every vector to nearest, like a token (`kernels.semantics.activations`).

        Raises:
          ValueError: bits other than 8 and 4, or an odd head_dim with 4.
        """
        *vectors, head_dim = heads.shape
        check_cache_bits(bits, head_dim)
        grid = BipolarFormat(bits)
        tokens = quantize_tokens(heads.reshape(-1, head_dim), grid)
        zero = ((tokens.zero_value + grid.max_value) // 2).astype(jnp.uint8)
        codes = tokens.codes
        if bits == 4:
            lower, upper = jnp.split(codes, 2, axis=-1)
            codes = lower | (upper << 4)
        return cls(codes.reshape(*vectors, -1), tokens.scale.reshape(vectors), zero.reshape(vectors), bits)

    def dequantize(self) -> Float[Array, "*vectors head_dim"]:
        """The numbers, float32; elementwise in codes, scale and zero, so that XLA fuses it into their reader."""
        codes = self.codes
        if self.bits == 4:
            # A broadcast and a shift: XLA would write a concatenation of halves to memory.
            shifts = jnp.array([0, 4], jnp.uint8).reshape((1,) * (codes.ndim - 1) + (2, 1))
            halves = (codes[..., None, :] >> shifts) & 15
            codes = halves.reshape(*codes.shape[:-1], -1)
        steps = codes.astype(jnp.float32) - self.zero[..., None].astype(jnp.float32)
        return 2 * self.scale[..., None] * steps


def as_read(heads: Float[Array, "*vectors head_dim"], bits: int) -> Float[Array, "*vectors head_dim"]:
    """The numbers that attention reads from a cache of so many bits in place of these, in their dtype."""
    return QuantizedHeads.quantize(heads, bits).dequantize().astype(heads.dtype)


def check_cache_bits(bits: int | None, head_dim: int) -> None:
    """Raises ValueError unless a cache can store heads of this size in `bits` bits; None is the model's own dtype."""
    if bits is not None and bits not in CACHE_BITS:
        raise ValueError(
            f"cache_bits must be {' or '.join(map(str, CACHE_BITS))}, or None to keep floats, got {bits!r}"
        )
    if bits == 4 and head_dim % 2:
        raise ValueError(f"a cache of 4 bits holds two numbers a byte, but {head_dim=} is odd: use cache_bits=8")
