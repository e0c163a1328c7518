"""Keys and values in bipolar-INT: 8 or 4 bits a number, one scale and zero for each vector of a head."""

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
    """Vectors of `head_dim` numbers, each vector on a grid of its own that its extremes span; these always hold:

    - number[..., d] = 2 * scale[...] * (code[..., d] - zero[...]), so that 0 is on the grid: it has the code `zero`;
    - a number differs from the one it was made of by at most half a step, which is `scale`, and by float32 rounding;
    - of 8 bits, byte d is the code of element d; of 4 bits, byte d has that of element d in its lower half and
      that of element d + head_dim / 2 in its upper one.

    Attributes:
      codes: bytes.
      scale: float32, half the grid's step; 0 for vectors of zeros, NaN or Inf for those that hold any.
      zero: the code of 0.
      bits: 8 or 4.
    """

    codes: UInt8[Array, "*vectors bytes"]
    scale: Float[Array, "*vectors"]
    zero: UInt8[Array, "*vectors"]
    bits: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def quantize(cls, heads: Float[Array, "*vectors head_dim"], bits: int) -> QuantizedHeads:
        """Rounds every vector to nearest, as activations are (`kernels.activations`).

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
        """The numbers, float32; elementwise in bytes, scale and zero, so that XLA fuses it into what reads it."""
        codes = self.codes
        if self.bits == 4:
            # A broadcast and a shift rather than two halves put together: XLA would write those to memory.
            halves = (codes[..., None, :] >> jnp.array([[0], [4]], jnp.uint8)) & 15
            codes = halves.reshape(*codes.shape[:-1], -1)
        steps = codes.astype(jnp.float32) - self.zero[..., None].astype(jnp.float32)
        return 2 * self.scale[..., None] * steps


def check_cache_bits(bits: int | None, head_dim: int) -> None:
    """Raises ValueError unless a cache can hold heads of this size at `bits`; None is the model's own dtype."""
    if bits is not None and bits not in CACHE_BITS:
        raise ValueError(
            f"cache_bits must be {' or '.join(map(str, CACHE_BITS))}, or None to keep floats, got {bits!r}"
        )
    if bits == 4 and head_dim % 2:
        raise ValueError(f"a cache of 4 bits holds two numbers a byte, but {head_dim=} is odd: use cache_bits=8")
