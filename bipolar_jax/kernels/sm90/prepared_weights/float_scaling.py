"""What threads do with float scales of groups: multiply codes, and scale the sums of every chunk of K in float32.

With codes u of weights and signed codes c of a token, a chunk of K in which no group ends adds

    S * (P + Z * C) + o * C,     P = sum_k c u,   C = sum_k c

to a row's float32 sum; S, Z and o are the chunk's terms (`packing.float_terms`). P and C are exact int32 sums of the
tensor core, C from a tile whose weights are ones. P + Z * C is exact too where -Z is a code: it has at most 24 bits.
Then each chunk rounds once, with o twice, by half a unit in the last place of the sum so far: a row's error is at most
(chunks of K) * 2^-24 times the sum of its terms' magnitudes, twice that with o.

Accumulators start at the word that is 12582912 as a float32. While a sum of integers stays below 2^22, as one of 128
products of bytes does, the accumulator read as a float32 is 12582912 plus the sum, and an addition gives the sum.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Pointer, Value
from bipolar_jax.kernels.sm90.prepared_weights.expansion import HALF_STEPS
from bipolar_jax.packing.fields import PART_ROWS
from bipolar_jax.packing.float_terms import FloatTerms, part_float_terms

_BIASED_ZERO, _BIAS = 0x4B400000, 12582912.0
_EVERY_BYTE = 0x01010101
_ROWS = 4  # of a lane: row 8 p + lane / 4 of either block, in the order 2 b + p
RowTerms = tuple[Value, Value, Value | None]


def chunk_pieces(chunk: int, count: int, steps: int = HALF_STEPS) -> list[tuple[int, int, int]]:
    """Where one of `count` chunks of half a stage, or of so many steps, is: (step, first, last) halves of steps."""
    halves = range(2 * steps * chunk // count, 2 * steps * (chunk + 1) // count)
    if len(halves) == 1:
        return [(halves[0] // 2, halves[0] % 2, halves[0] % 2 + 1)]
    return [(half // 2, 0, 2) for half in halves[::2]]


@dataclasses.dataclass(frozen=True)
class FloatScaling:
    """How sums of chunks are scaled.

    Attributes:
      kind: the form of the terms.
      zero: Z of all rows, where the terms have none.
    """

    kind: FloatTerms
    zero: float

    def load_terms(self, terms: Pointer, lane: Value) -> list[RowTerms]:
        """S, Z and o of a lane's four rows; o is None where it is 0.

        Args:
          terms: of one chunk and part in shared memory.
          lane: of the thread in its warp.
        """
        mine = ptx.advance(terms, ptx.times(ptx.shift_right(lane, 2), 4 * _ROWS))
        first = ptx.load(mine, _ROWS)
        if self.kind == "zeros":
            pairs = [ptx.expand("f16", word) for word in first]
            return [(scale, zero, None) for scale, zero in pairs]
        if self.kind == "minimums":  # the products with W / 2 are exact
            pairs, half = [ptx.expand("f16", word) for word in first], ptx.float32(-self.zero)
            return [(scale, ptx.float32(self.zero), ptx.fma(scale, half, minimum)) for scale, minimum in pairs]
        scales, zero = [ptx.as_float(word) for word in first], ptx.float32(self.zero)
        if self.kind == "scales":
            return [(scale, zero, None) for scale in scales]
        offsets = [ptx.as_float(word) for word in ptx.load(ptx.advance(mine, 4 * PART_ROWS), _ROWS)]
        return [(scale, zero, offset) for scale, offset in zip(scales, offsets, strict=True)]

    def multiply(self, weights: list[list[Value]], tokens: list[list[Value]]) -> list[Value]:
        """The sums of a tile over a chunk: four numbers as floats, see `ptx.multiply_add_byte_tiles`.

        Args:
          weights: operands a of the instructions that the chunk takes.
          tokens: their operands b.
        """
        sums = [ptx.int32(_BIASED_ZERO)] * 4
        for a, b in zip(weights, tokens, strict=True):
            sums = ptx.multiply_add_byte_tiles(a, b, sums)
        return [ptx.subtract(ptx.as_float(word), ptx.float32(_BIAS)) for word in sums]

    def token_sums(self, tokens: list[list[Value]]) -> list[Value]:
        """C of the lane's two columns, as floats."""
        ones = [[ptx.int32(_EVERY_BYTE)] * (2 * len(b)) for b in tokens]
        return self.multiply(ones, tokens)[:2]

    def add(self, total: Value, terms: RowTerms, product: Value, token_sum: Value) -> Value:
        """A row's sum for one token, with a chunk."""
        scale, zero, offset = terms
        total = ptx.fma(scale, ptx.fma(zero, token_sum, product), total)
        return total if offset is None else ptx.fma(offset, token_sum, total)


def scaled_products(
    codes: Float[Array, "parts stages rows positions"],
    tokens: Float[Array, "m stages chunks size"],
    terms: UInt32[Array, "parts stages chunks words"],
    w_format: BipolarFormat,
    kind: FloatTerms,
) -> Float[Array, "parts stages rows m"]:
    """What the chunks of each stage add, in jnp: codes of weights, signed codes of tokens, and terms of chunks."""
    scale, zero, offset = part_float_terms(terms, w_format, kind)
    by_chunk = codes.reshape(*codes.shape[:3], tokens.shape[2], -1)
    products = jnp.einsum("psrck,msck->psrcm", by_chunk, tokens)
    token_sums = jnp.sum(tokens, axis=-1).transpose(1, 2, 0)[None, :, None]
    scaled = scale[..., None] * (zero[..., None] * token_sums + products)
    return jnp.sum(scaled if offset is None else scaled + offset[..., None] * token_sums, axis=-2)
