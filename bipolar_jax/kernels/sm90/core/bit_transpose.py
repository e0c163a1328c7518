"""From 32 rounded floats in a thread's registers to words of codes, or to words of bit planes.

A float is rounded by adding it to a power of two so large that the code lands at a chosen bit of the sum's mantissa;
the fraction is cut off below. Floats whose codes share a byte are rounded to neighbouring fields, so that one LOP3
merges two of them, and three PRMT put the bytes of four together. No code is ever shifted.

Of a block's 32 codes, code e is a field of `width` bits (1, 2, 4 or 8) of word e mod width, at bit e - e mod width.
Transposing each width x width square of bits, log2(width) exchanges between pairs of words, makes bit i of that field
bit e of plane i. With fields of 8 bits the words are already the int8 operand: byte t of word j is element 8 t + j.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx

_BYTE = 8
_MANTISSA_BITS = 23
_CODE_BYTE = 1  # the byte of a rounded float that holds its field


@dataclasses.dataclass(frozen=True)
class CodeWords:
    """How the words of a block of 32 codes are divided into fields.

    Attributes:
      a_format: format of the codes.
      signed: codes are u - code_offset in two's complement, one byte each, instead of u.
    """

    a_format: BipolarFormat
    signed: bool

    @property
    def width(self) -> int:
        """Bits of a field; also the number of words of a block."""
        bits = _BYTE if self.signed else self.a_format.bits
        return 1 << (bits - 1).bit_length()

    @property
    def least_code(self) -> int:
        return -self.a_format.code_offset if self.signed else 0

    @property
    def field_starts(self) -> tuple[int, ...]:
        """First bits of the fields of a byte."""
        return tuple(range(0, _BYTE, self.width))

    def field_start(self, i: int) -> int:
        """First bit, in its byte, of the i-th of eight codes that share a byte of every word."""
        return i - i % self.width

    def rounding_base(self, field_start: int) -> float:
        """The addend after which the sum, rounded down, has the low bits of its integer part at `field_start`.

        Times 1.5 for signed codes, so that the sum of a negative one stays between the same powers of two.
        """
        power = 2.0 ** (_MANTISSA_BITS - _BYTE * _CODE_BYTE - field_start)
        return 1.5 * power if self.signed else power

    def valid_bits(self, word: int, count: int) -> int:
        """Mask of the fields of the block's first `count` codes."""
        field = (1 << self.width) - 1
        return sum(field << (e - e % self.width) for e in range(word, count, self.width))


def gather_words(
    code_words: CodeWords, rounded: Sequence[Sequence[ptx.Value]], byte_order: ptx.Value
) -> list[ptx.Value]:
    """Words of codes of a block.

    Args:
      code_words: the fields.
      rounded: four times 8 rounded floats, as words; the i-th eight belong to the i-th byte of `byte_order`.
      byte_order: from `byte_order_of`.
    """
    words = []
    for word in range(code_words.width):
        merged = []
        for eight in rounded:
            total = eight[word]
            for i in range(word + code_words.width, _BYTE, code_words.width):
                from_field = (-1 << (_BYTE * _CODE_BYTE + code_words.field_start(i))) & 0xFFFFFFFF
                total = ptx.choose_bits(from_field, eight[i], total)
            merged.append(total)
        selector = _CODE_BYTE | (4 + _CODE_BYTE) << 4
        halves = [ptx.pick_bytes(a, b, selector) for a, b in (merged[:2], merged[2:])]
        words.append(ptx.pick_bytes(*halves, byte_order))
    return words


def byte_order_of(swizzle: ptx.Value) -> ptx.Value:
    """`gather_words`' byte order for a thread whose i-th eight codes belong to byte i ^ swizzle."""
    # The last PRMT takes bytes 0 and 1 from its first operand (selectors 0, 1), 2 and 3 from its second (4, 5).
    flips = ptx.flip_bits(ptx.times(ptx.bits_of(swizzle, 1), 0x1111), ptx.times(ptx.bits_of(swizzle, 2), 0x2222))
    return ptx.flip_bits(flips, 0x5410)


def transpose_to_planes(words: Sequence[ptx.Value]) -> list[ptx.Value]:
    """Bit planes of a block from its words of unsigned codes; as many planes as words, plane i is result i."""
    planes = list(words)
    distance = 1
    while distance < len(planes):
        low = sum(1 << bit for bit in range(32) if not bit & distance)
        for i in range(len(planes)):
            if not i & distance:
                a, b = planes[i], planes[i + distance]
                planes[i] = ptx.choose_bits(low, a, ptx.shift_left(b, distance))
                planes[i + distance] = ptx.choose_bits(low, ptx.shift_right(a, distance), b)
        distance *= 2
    return planes
