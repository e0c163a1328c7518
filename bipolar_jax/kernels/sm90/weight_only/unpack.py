"""Bit planes of weights converted to 16-bit floats, in registers.

Bits e and e + 16 of a plane's word are in the two halves of the word, where the low bits of a pair of 16-bit floats
are. Codes of up to four bits are assembled from planes, shifted into the mantissa of a power of two, and one fused
multiply-add makes the value from that, exactly. With t = B + 2^p u, where B is the power of two whose last place is 1,

    v = 2 u - W = 2^(1-p) t - (2^(1-p) B + W)

For p >= 1 the constant has no more digits than the float type. Codes of more than four bits are converted in two
halves.
"""

from __future__ import annotations

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.float_types import FloatType
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value

PAIRS = 16  # pairs of elements e and e + 16 of a word
_HALF_BITS = 4  # bits of the low half of a code of more bits
_MANTISSA_BITS = 7  # of bfloat16; float16 has more


def unpack(planes: list[Value], w_format: BipolarFormat, float_type: FloatType) -> list[Value]:
    """Values of the 32 elements of a word, in pairs: word e of the result holds those of elements e and e + 16.

    Args:
      planes: the word of each plane, low plane first.
      w_format: format of the weights.
      float_type: type of the result.
    """
    if w_format.ternary:
        # Both bits have weight 1: their sum is a code of two bits.
        planes = [ptx.flip_bits(*planes), ptx.bits_of(*planes)]
    w = w_format.max_value
    if len(planes) <= _HALF_BITS:
        fields = _fields(planes, float_type)
        return [_scaled(t, float_type, 2.0 / (1 << p), -(2.0 * float_type.base / (1 << p) + w)) for t, p in fields]
    low, high = _fields(planes[:_HALF_BITS], float_type), _fields(planes[_HALF_BITS:], float_type, _HALF_BITS)
    values = []
    for (t_low, p_low), (t_high, p_high) in zip(low, high, strict=True):
        assert p_low == p_high == 1
        # v = (32 high - W - 1) + (2 low + 1): both are exact, and so is their sum.
        above = _scaled(t_high, float_type, 16.0, -(16.0 * float_type.base + w + 1))
        below = _scaled(t_low, float_type, 1.0, -(float_type.base - 1.0))
        values.append(ptx.fma_pairs(float_type.name, below, _pair(float_type, 1.0), above))
    return values


def _fields(planes: list[Value], float_type: FloatType, width: int | None = None) -> list[tuple[Value, int]]:
    """(B + 2^p u, p) of all pairs, where u are codes of up to 4 planes."""
    if width is None:
        width = 1 << (len(planes) - 1).bit_length()  # 1, 2 or 4 bits
    words = _transposed([*planes, *[None] * (width - len(planes))])
    mask, base = (1 << width) - 1, float_type.base_bits * 0x10001
    pairs: list = [None] * PAIRS
    for column, word in enumerate(words):
        # Shifted so that the first field has p = 1; shifted again for the first field that would leave the mantissa.
        shift, shifted = None, None
        for field in range(PAIRS // width):
            if shift is None or width * field - shift + width > _MANTISSA_BITS:
                shift = width * field - 1
                shifted = ptx.shift_right(word, shift) if shift >= 0 else ptx.shift_left(word, -shift)
            p = width * field - shift
            pairs[width * field + column] = ptx.masked_or(shifted, (mask << p) * 0x10001, base), p
    return pairs


def _transposed(words: list[Value | None]) -> list[Value]:
    """Words of 1, 2 or 4 planes, transposed to words of codes: field j of word c is the code of element j * count + c.

    Exchanges off-diagonal blocks of 1, then of 2 bits (Hacker's Delight, section 7-3). None is a plane of zeros.
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


def _scaled(t: Value, float_type: FloatType, factor: float, term: float) -> Value:
    return ptx.fma_pairs(float_type.name, t, _pair(float_type, factor), _pair(float_type, term))


def _pair(float_type: FloatType, value: float) -> Value:
    return ptx.int32(float_type.bits_of(value) * 0x10001)
