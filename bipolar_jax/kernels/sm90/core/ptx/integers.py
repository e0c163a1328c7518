"""Integers and bits. Functions with an `int` operand take a constant."""

from __future__ import annotations

import itertools

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


def shift_left(word: Value, count: Value | int) -> Value:
    return word if isinstance(count, int) and not count else arith.shli(word, _value(count))


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


def add_pair_products(pair: Value, byte_pairs: Value, total: Value, *, high: bool) -> Value:
    """total plus the products of a word's 16-bit numbers with the two low, or high, bytes of another; all unsigned."""
    ptx = f"dp2a.{'hi' if high else 'lo'}.u32.u32 $0, $1, $2, $3;"
    return inline_ptx(ptx, pair, byte_pairs, total, result_types=i32_type())


def multiply_add_bit_tiles(a: list[Value], b: list[Value], c: list[Value]) -> list[Value]:
    """a . b + c on the warp's tensor core: [16, K] bits times [K, 8] bits, int32; K is 128 or 256.

    With r = lane // 4 and q = lane % 4, a lane's words of a and b each hold 32 elements, at k = 32 q, and where K is
    256 also at 32 q + 128. Of a: rows r and r + 8 at the first k, then both at the second. Of b: column r at both k. c
    is as in `multiply_add_byte_tiles` (PTX ISA, "Matrix Fragments for mma.m16n8k128" and "k256").
    """
    return _multiply_add(f"m16n8k{128 * len(b)}.row.col.s32.b1.b1.s32.and.popc", a, b, c)


def multiply_add_byte_tiles(a: list[Value], b: list[Value], c: list[Value]) -> list[Value]:
    """a . b + c on the warp's tensor core: [16, 32] unsigned bytes times [32, 8] signed ones, int32; or K is 16.

    With r = lane // 4 and q = lane % 4, a lane's words of a and b each hold four elements, at k = 4 q or at 4 q + 16.
    Of a: rows r and r + 8 at the first k, then both at the second. Of b: column r at both k. Of c: columns 2 q and
    2 q + 1 of row r, then of row r + 8 (PTX ISA, "Matrix Fragments for mma.m16n8k32"). Where K is 16, a and b have the
    words of the first k alone.
    """
    return _multiply_add(f"m16n8k{16 * len(b)}.row.col.s32.u8.s8.s32", a, b, c)


def _multiply_add(shape: str, a: list[Value], b: list[Value], c: list[Value]) -> list[Value]:
    ends = list(itertools.accumulate((4, len(a), len(b), 4), initial=0))
    names = [[f"${i}" for i in range(start, end)] for start, end in itertools.pairwise(ends)]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in names)
    ptx = f"mma.sync.aligned.{shape} {operands};"
    return list(inline_ptx(ptx, *a, *b, *c, result_types=(i32_type(),) * 4, convergent=True))
