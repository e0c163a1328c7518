"""From 32 rounded numbers in a thread's registers to words of codes or of bit planes.

A number is rounded by adding it to a power of two so large that the sum's mantissa has the
code at a chosen bit; the bits below are the fraction, cut off. Numbers that meet in one byte are
rounded to places beside each other, so that one LOP3 merges two of them, and the bytes of four
are put together by three PRMT. No code is ever shifted.

Of the 32 numbers of a block, number e has a field of `width` bits (1, 2, 4 or 8) in word
e mod width, at bit e - e mod width. Bit i of that field is then bit e of plane i, once each
width x width square of bits is transposed: log2(width) exchanges between pairs of words. With
fields of 8 bits the words are what the int8 operand has: byte t of word j is number 8 t + j.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx

_BYTE = 8
_MANTISSA_BITS = 23
_CODE_BYTE = 1  # of a rounded number: its share of a byte of codes


@dataclasses.dataclass(frozen=True)
class CodeWords:
    """Where the codes of a block are.

    Attributes:
      a_format: of the codes.
      signed: the codes are u - code_offset in two's complement, a byte each, instead of u.
    """

    a_format: BipolarFormat
    signed: bool

    @property
    def width(self) -> int:
        """Bits of a field, and words of a block."""
        bits = _BYTE if self.signed else self.a_format.bits
        return 1 << (bits - 1).bit_length()

    @property
    def least_code(self) -> int:
        return -self.a_format.code_offset if self.signed else 0

    @property
    def places(self) -> tuple[int, ...]:
        """Bits of a byte at which fields begin."""
        return tuple(range(0, _BYTE, self.width))

    def place(self, number: int) -> int:
        """That of number 0 ... 7 of the eight that share a byte of each word."""
        return number - number % self.width

    def rounding_base(self, place: int) -> float:
        """What to add so that the sum, rounded down, has its integer part's low bits at the place.

        Half as much again where there are codes below zero, so that the sum stays between
        two powers of two.
        """
        power = 2.0 ** (_MANTISSA_BITS - _BYTE * _CODE_BYTE - place)
        return 1.5 * power if self.signed else power

    def valid_bits(self, word: int, count: int) -> int:
        """Mask of the fields of the block's first `count` numbers."""
        field = (1 << self.width) - 1
        return sum(field << (e - e % self.width) for e in range(word, count, self.width))


def gather_words(
    code_words: CodeWords, rounded: Sequence[Sequence[ptx.Value]], byte_order: ptx.Value
) -> list[ptx.Value]:
    """Words of codes of a block.

    Args:
      code_words: where the codes go.
      rounded: four times 8 rounded numbers, those of a byte together, as words.
      byte_order: from `byte_order_of`.
    """
    words = []
    for word in range(code_words.width):
        merged = []
        for eight in rounded:
            total = eight[word]
            for number in range(word + code_words.width, _BYTE, code_words.width):
                from_place = (-1 << (_BYTE * _CODE_BYTE + code_words.place(number))) & 0xFFFFFFFF
                total = ptx.choose_bits(from_place, eight[number], total)
            merged.append(total)
        selector = _CODE_BYTE | (4 + _CODE_BYTE) << 4
        halves = [ptx.pick_bytes(a, b, selector) for a, b in (merged[:2], merged[2:])]
        words.append(ptx.pick_bytes(*halves, byte_order))
    return words


def byte_order_of(swizzle: ptx.Value) -> ptx.Value:
    """The selector for `gather_words` of a thread whose i-th eight numbers are those of byte i ^ swizzle."""
    # Of the last PRMT's operands the first has bytes 0, 1 (selected by 0, 1), the second bytes 2, 3 (by 4, 5).
    flips = ptx.flip_bits(ptx.times(ptx.bits_of(swizzle, 1), 0x1111), ptx.times(ptx.bits_of(swizzle, 2), 0x2222))
    return ptx.flip_bits(flips, 0x5410)


def transpose_to_planes(words: Sequence[ptx.Value]) -> list[ptx.Value]:
    """Bit planes of a block from its words of unsigned codes, as many; plane i is result i."""
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
