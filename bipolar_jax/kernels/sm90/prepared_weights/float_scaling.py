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
from bipolar_jax.packing.float_terms import (
    BLOCK_TERMS,
    ROW_WORDS,
    FloatTerms,
    block_words,
    part_float_terms,
    terms_shape,
)

_BIASED_ZERO, _BIAS = 0x4B400000, 12582912.0
_TWO_TO_23 = 0x4B000000  # as a float32
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

    def load_terms(self, terms: Pointer, chunk: int, lane: Value) -> list[RowTerms]:
        """S, Z and o of a lane's four rows; o is None where it is 0.

        Args:
          terms: of one stage and part in shared memory.
          chunk: of the stage.
          lane: of the thread in its warp.
        """
        if self.kind in BLOCK_TERMS:
            return self._load_block_terms(terms, chunk, lane)
        (_, words), own = terms_shape(self.kind, 1), ptx.times(ptx.shift_right(lane, 2), 4 * _ROWS)
        mine = ptx.advance(ptx.advance(terms, 4 * words * chunk), own)
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

    def _load_block_terms(self, terms: Pointer, chunk: int, lane: Value) -> list[RowTerms]:
        row, head = ptx.shift_right(lane, 2), block_words(self.kind)
        blocks = ptx.load(ptx.advance(terms, ptx.times(row, head // 2)), head // 8)
        pairs, half = [ptx.expand("f16", word) for word in blocks], ptx.float32(-self.zero)
        integers = ptx.advance(ptx.advance(terms, 4 * head), ptx.times(row, 4))

        def load(vector: int) -> Value:
            (word,) = ptx.load(ptx.advance(integers, 4 * ROW_WORDS * vector), 1)
            return word

        if self.kind == "block_scales":
            rows = zip([scale for pair in pairs for scale in pair], _numbers_of_bytes(load(chunk), 128), strict=True)
            return [(ptx.multiply(*row), ptx.float32(self.zero - 0.5), None) for row in rows]
        if self.kind == "block_nibbles":
            word = load(chunk)
            steps, minimums = (ptx.bits_of(each, 0x0F0F0F0F) for each in (word, ptx.shift_right(word, 4)))
        else:
            pair, odd = divmod(chunk, 2)
            word, highs = load(3 * pair + odd), load(3 * pair + 2)
            highs = ptx.shift_right(highs, 2) if odd else ptx.shift_left(highs, 2)
            steps = ptx.bits_of(word, 0x3F3F3F3F)
            minimums = ptx.choose_bits(0x3C3C3C3C, highs, ptx.bits_of(ptx.shift_right(word, 6), 0x03030303))
        loaded = []
        for (scale, minimum), step, number in zip(
            pairs, _numbers_of_bytes(steps), _numbers_of_bytes(minimums), strict=True
        ):
            scale = ptx.multiply(scale, step)
            offset = ptx.fma(scale, half, ptx.multiply(minimum, number))
            loaded.append((scale, ptx.float32(self.zero), offset))
        return loaded

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


def _numbers_of_bytes(word: Value, bias: int = 0) -> list[Value]:
    """The bytes of a word less a bias, as floats: 2^23 + a byte is a float whose lowest byte it is."""
    words = [ptx.pick_bytes(word, ptx.int32(_TWO_TO_23), 0x7440 + index) for index in range(4)]
    return [ptx.subtract(ptx.as_float(each), ptx.float32(2.0**23 + bias)) for each in words]


def scaled_products(
    codes: Float[Array, "parts stages rows positions"],
    tokens: Float[Array, "m stages chunks size"],
    terms: UInt32[Array, "parts stages vectors words"],
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
