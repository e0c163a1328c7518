"""Integers and bits. Functions with an `int` operand take a constant."""

from __future__ import annotations

from jax.experimental.mosaic.gpu.utils import inline_ptx
from jaxlib.mlir.dialects import arith

from bipolar_jax.kernels.sm90.core.ptx.types import Value, _value, i32_type, int32


def less(a: Value | int, b: Value | int) -> Value:
    return arith.cmpi(arith.CmpIPredicate.slt, _value(a), _value(b))


def equal(a: Value, b: Value | int) -> Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, _value(b))


def choose(condition: Value, a: Value, b: Value) -> Value:
    return arith.select(condition, a, b)


def smaller(a: Value, b: int) -> Value:
    return arith.minsi(a, int32(b))


def plus(a: Value, b: Value | int) -> Value:
    return arith.addi(a, _value(b))


def times(a: Value, b: Value | int) -> Value:
    return arith.muli(a, _value(b))


def divided(a: Value, b: int) -> Value:
    """a // b, neither of them negative."""
    return arith.divui(a, int32(b))


def either_bits(a: Value, b: Value) -> Value:
    return arith.ori(a, b)


def shift_right_signed(word: Value, count: int) -> Value:
    return arith.shrsi(word, int32(count))


def bits_of(word: Value, mask: Value | int) -> Value:
    return arith.andi(word, _value(mask))


def flip_bits(word: Value, mask: Value | int) -> Value:
    return arith.xori(word, _value(mask))


def shift_left(word: Value, count: int) -> Value:
    return arith.shli(word, int32(count)) if count else word


def shift_right(word: Value, count: Value | int) -> Value:
    return word if isinstance(count, int) and not count else arith.shrui(word, _value(count))


def choose_bits(mask: int, ones: Value, zeros: Value) -> Value:
    """Bits of `ones` where the mask is 1, of `zeros` where it is 0: one LOP3."""
    return inline_ptx("lop3.b32 $0, $1, $2, $3, 0xCA;", int32(mask), ones, zeros, result_types=i32_type())


def masked_or(word: Value, mask: int, ones: int) -> Value:
    """(word & mask) | ones: one LOP3."""
    return inline_ptx("lop3.b32 $0, $1, $2, $3, 0xEA;", word, int32(mask), int32(ones), result_types=i32_type())


def pick_bytes(a: Value, b: Value, selector: Value | int) -> Value:
    """PRMT: nibble t of the selector is the source of byte t of the result, 0 to 3 in a, 4 to 7 in b."""
    return inline_ptx("prmt.b32 $0, $1, $2, $3;", a, b, _value(selector), result_types=i32_type())


def count_ones(word: Value) -> Value:
    return inline_ptx("popc.b32 $0, $1;", word, result_types=i32_type())


def add_bytes(word: Value, total: Value, *, signed: bool) -> Value:
    """total plus the four bytes of the word."""
    ptx = "dp4a.{0}.{0} $0, $1, $2, $3;".format("s32" if signed else "u32")
    return inline_ptx(ptx, word, int32(0x01010101), total, result_types=i32_type())
