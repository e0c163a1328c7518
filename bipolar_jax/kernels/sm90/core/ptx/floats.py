"""Floating-point numbers. Every rounding is explicit: the compiler neither contracts nor reorders these operations."""

from __future__ import annotations

import struct

from jax.experimental.mosaic.gpu.utils import inline_ptx
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from bipolar_jax.kernels.sm90.core.ptx.integers import bits_of, shift_left
from bipolar_jax.kernels.sm90.core.ptx.types import Value, f32_type, float32, i32_type


def as_float(word: Value) -> Value:
    return arith.bitcast(f32_type(), word)


def as_word(number: Value) -> Value:
    return arith.bitcast(i32_type(), number)


def expand(ptx_type: str, word: Value) -> list[Value]:
    """The floats that a word holds, one "f32" or two "bf16" or "f16", low half first, as float32."""
    if ptx_type == "f32":
        return [as_float(word)]
    if ptx_type == "bf16":
        return [as_float(shift_left(word, 16)), as_float(bits_of(word, 0xFFFF0000))]
    halves = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
    return list(inline_ptx(halves, word, result_types=(f32_type(), f32_type())))


def extreme(kind: str, ptx_type: str, a: Value, b: Value) -> Value:
    """ "max" or "min" of words that hold floats as in `expand`; NaN if either is."""
    if ptx_type == "f32":
        return as_word(_float_op(f"{kind}.NaN.f32", as_float(a), as_float(b)))
    return inline_ptx(f"{kind}.NaN.{ptx_type}x2 $0, $1, $2;", a, b, result_types=i32_type())


def fma_pairs(ptx_type: str, a: Value, b: Value, c: Value) -> Value:
    """a * b + c of words that hold two "bf16" or "f16" each."""
    return inline_ptx(f"fma.rn.{ptx_type}x2 $0, $1, $2, $3;", a, b, c, result_types=i32_type())


def rounded(ptx_type: str, a: Value) -> Value:
    """A float32 as "bf16" or "f16", in the low half of a word; to nearest, ties to even."""
    ptx = f"{{.reg .b16 h; cvt.rn.{ptx_type}.f32 h, $1; mov.b32 $0, {{h, h}};}}"
    return inline_ptx(ptx, a, result_types=i32_type())


def rounded_pair(ptx_type: str, low: Value, high: Value) -> Value:
    """Two float32 as "bf16" or "f16", as `rounded`, in a word."""
    return inline_ptx(f"cvt.rn.{ptx_type}x2.f32 $0, $1, $2;", high, low, result_types=i32_type())


def multiply_add_tiles(ptx_type: str, a: list[Value], b: list[Value], c: list[Value]) -> list[Value]:
    """a . b + c on the warp's tensor core: [16, 16] times [16, 8] of "bf16" or "f16", accumulated in float32.

    With r = lane // 4 and q = lane % 4, a lane's words each hold two elements, at k = 2 q or at k = 2 q + 8. Of a: rows
    r and r + 8 at the first k, then both at the second. Of b: column r at both k. Of c: columns 2 q and 2 q + 1 of row
    r, then of row r + 8 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
    """
    names = [[f"${i}" for i in range(start, start + count)] for start, count in ((0, 4), (4, 4), (8, 2), (10, 4))]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in names)
    ptx = f"mma.sync.aligned.m16n8k16.row.col.f32.{ptx_type}.{ptx_type}.f32 {operands};"
    return list(inline_ptx(ptx, *a, *b, *c, result_types=(f32_type(),) * 4, convergent=True))


def fma(a: Value, b: Value, c: Value) -> Value:
    return _float_op("fma.rn.f32", a, b, c)


def multiply(a: Value, b: Value) -> Value:
    return _float_op("mul.rn.f32", a, b)


def add(a: Value, b: Value) -> Value:
    return _float_op("add.rn.f32", a, b)


def add_down(a: Value, b: Value) -> Value:
    """a + b rounded toward minus infinity."""
    return _float_op("add.rm.f32", a, b)


def subtract(a: Value, b: Value) -> Value:
    return _float_op("sub.rn.f32", a, b)


def divide(a: Value, b: Value) -> Value:
    return _float_op("div.rn.f32", a, b)


def rsqrt(a: Value) -> Value:
    """1 / sqrt(a), with an error of at most 2 in the last place."""
    return _float_op("rsqrt.approx.f32", a)


def reciprocal(a: Value) -> Value:
    """1 / a, with an error of at most 1 in the last place."""
    return _float_op("rcp.approx.ftz.f32", a)


def exp2(a: Value) -> Value:
    """2^a, with an error of at most 2 in the last place; 0 below 2^-126."""
    return _float_op("ex2.approx.ftz.f32", a)


def at_most(a: Value, limit: float) -> Value:
    """min(a, limit); the limit where a is NaN."""
    return _float_op("min.f32", a, limit)


def at_least(a: Value, limit: float) -> Value:
    """max(a, limit); the limit where a is NaN."""
    return _float_op("max.f32", a, limit)


def is_less(a: Value, b: float) -> Value:
    """False where a is NaN."""
    return arith.cmpf(arith.CmpFPredicate.OLT, a, float32(b))


def is_greater(a: Value, b: float) -> Value:
    """False where a is NaN."""
    return arith.cmpf(arith.CmpFPredicate.OGT, a, float32(b))


def floor(a: Value) -> Value:
    return _float_op("cvt.rmi.f32.f32", a)


def from_int(word: Value) -> Value:
    """A signed word as float32, to nearest."""
    return inline_ptx("cvt.rn.f32.s32 $0, $1;", word, result_types=f32_type())


def to_int(a: Value) -> Value:
    """The int32 of a float that is an integer."""
    return arith.fptosi(i32_type(), a)


def _float_op(mnemonic: str, *operands: Value | float) -> Value:
    """A float32 instruction; Python floats become immediate operands."""
    values = [v for v in operands if isinstance(v, ir.Value)]
    names = iter(f"${i + 1}" for i in range(len(values)))
    text = [
        next(names) if isinstance(v, ir.Value) else "0f{:08X}".format(*struct.unpack("<I", struct.pack("<f", v)))
        for v in operands
    ]
    return inline_ptx(f"{mnemonic} $0, {', '.join(text)};", *values, result_types=f32_type())
