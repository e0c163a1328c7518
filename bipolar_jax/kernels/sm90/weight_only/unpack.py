"""Bit planes of weights turned into floating-point numbers, in registers.

Bits e and e + 16 of a plane's word stand where the low bits of a pair of 16-bit numbers are. Codes
of a few bits are put together from planes, shifted so that they fall into the mantissa of a power of two, and one
fused multiply-add makes the value of that, exactly: with t = B + 2^p u, where 1 is B's last place,

    v = 2 u - W = 2^(1-p) t - (2^(1-p) B + W)

For p >= 1 the constant has as many digits as the numbers. Codes of more than four bits do so in two halves.
"""

from __future__ import annotations

import dataclasses

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value

PAIRS = 16  # of the elements of a word
_HALF_BITS = 4  # of a code of more bits
_MANTISSA_BITS = 7  # that both kinds of numbers have


@dataclasses.dataclass(frozen=True)
class Number:
    """A floating-point number of 16 bits.

    Attributes:
      name: "bf16" or "f16".
      base: B, the power of two whose last place is 1.
      base_word: its bits.
      one_word: the bits of 1.
    """

    name: str
    base: int
    base_word: int
    one_word: int

    def word(self, number: float) -> int:
        """The bits of a small integer times a power of two, which must be exact."""
        if number == 0:
            return 0
        sign, magnitude, exponent = int(number < 0), abs(number), 0
        while magnitude >= 2:
            magnitude, exponent = magnitude / 2, exponent + 1
        while magnitude < 1:
            magnitude, exponent = magnitude * 2, exponent - 1
        places = self.base.bit_length() - 1
        mantissa = (magnitude - 1) * (1 << places)
        assert mantissa == int(mantissa), f"{number} is not exact in {self.name}"
        return (sign << 15) + self.one_word + (exponent << places) + int(mantissa)


BF16 = Number("bf16", 128, 0x4300, 0x3F80)
F16 = Number("f16", 1024, 0x6400, 0x3C00)


def unpack(planes: list[Value], w_format: BipolarFormat, number: Number) -> list[Value]:
    """Values of the 32 elements of a word: number e of the result has those of elements e and e + 16.

    Args:
      planes: the word of each plane, low plane first.
      w_format: of the weights.
      number: of the result.
    """
    if w_format.ternary:
        # Both bits count 1: their sum is a code of two bits.
        planes = [ptx.flip_bits(*planes), ptx.bits_of(*planes)]
    w = w_format.max_value
    if len(planes) <= _HALF_BITS:
        fields = _fields(planes, number)
        return [_scaled(t, number, 2.0 / (1 << p), -(2.0 * number.base / (1 << p) + w)) for t, p in fields]
    low, high = _fields(planes[:_HALF_BITS], number), _fields(planes[_HALF_BITS:], number, _HALF_BITS)
    values = []
    for (t_low, p_low), (t_high, p_high) in zip(low, high, strict=True):
        assert p_low == p_high == 1
        # v = (32 high - W - 1) + (2 low + 1): both are exact, and so is their sum.
        above = _scaled(t_high, number, 16.0, -(16.0 * number.base + w + 1))
        below = _scaled(t_low, number, 1.0, -(number.base - 1.0))
        values.append(ptx.fma_pairs(number.name, below, _pair(number, 1.0), above))
    return values


def _fields(planes: list[Value], number: Number, width: int | None = None) -> list[tuple[Value, int]]:
    """B + 2^p u of all pairs, with p; u are codes of up to 4 planes."""
    if width is None:
        width = 1 << (len(planes) - 1).bit_length()  # 1, 2 or 4 bits
    words = _transposed([*planes, *[None] * (width - len(planes))])
    mask, base = (1 << width) - 1, number.base_word * 0x10001
    pairs: list = [None] * PAIRS
    for column, word in enumerate(words):
        shift, shifted = None, None  # to the right, until p is 1 for the first field that is taken
        for field in range(PAIRS // width):
            if shift is None or width * field - shift + width > _MANTISSA_BITS:
                shift = width * field - 1
                shifted = ptx.shift_right(word, shift) if shift >= 0 else ptx.shift_left(word, -shift)
            p = width * field - shift
            pairs[width * field + column] = ptx.masked_or(shifted, (mask << p) * 0x10001, base), p
    return pairs


def _transposed(words: list[Value | None]) -> list[Value]:
    """1, 2 or 4 words, one a plane, as words of codes: field j of word c is the code of element j * count + c.

    Blocks of 1, then of 2 bits off the diagonal are exchanged (Hacker's Delight, section 7-3). None is zeros.
    """
    words, count = list(words), len(words)
    for distance, low in ((1, 0x55555555), (2, 0x33333333)):
        if distance >= count:
            break
        for i in range(count):
            if not i & distance:
                words[i], words[i + distance] = _exchanged(words[i], words[i + distance], distance, low)
    return words


def _exchanged(a: Value | None, b: Value | None, distance: int, low: int) -> tuple[Value | None, Value | None]:
    if b is None:
        return (None, None) if a is None else (ptx.bits_of(a, low), ptx.bits_of(ptx.shift_right(a, distance), low))
    return (
        ptx.choose_bits(low, a, ptx.shift_left(b, distance)),
        ptx.choose_bits(low, ptx.shift_right(a, distance), b),
    )


def _scaled(t: Value, number: Number, factor: float, term: float) -> Value:
    return ptx.fma_pairs(number.name, t, _pair(number, factor), _pair(number, term))


def _pair(number: Number, value: float) -> Value:
    return ptx.int32(number.word(value) * 0x10001)
