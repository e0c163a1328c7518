"""Instructions that the row quantizer needs of a thread, as functions of registers.

Values are MLIR values of type i32 or f32 (booleans i1); a "word" is an i32 of which only the
bits count. Whatever rounds says how: the compiler contracts or reorders none of these.
"""

from __future__ import annotations

import struct

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, inline_ptx, memref_ptr
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

Value = ir.Value
GLOBAL, SHARED = 1, 3  # address spaces


def i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def f32_type() -> ir.Type:
    return ir.F32Type.get()


def int32(number: int) -> Value:
    """A constant, given signed or unsigned."""
    return mgpu.c(number - (1 << 32) if number >= 1 << 31 else number, i32_type())


def int64(number: int) -> Value:
    return mgpu.c(number, ir.IntegerType.get_signless(64))


def float32(number: float) -> Value:
    return mgpu.c(float(number), f32_type())


def as_float(word: Value) -> Value:
    return arith.bitcast(f32_type(), word)


def as_word(number: Value) -> Value:
    return arith.bitcast(i32_type(), number)


def compare(kind: str, a: Value, b: Value) -> Value:
    """Signed integers: eq, slt...; floats: oeq, olt, ogt..., false where either is NaN."""
    if a.type == f32_type():
        return arith.cmpf(getattr(arith.CmpFPredicate, kind.upper()), a, b)
    return arith.cmpi(getattr(arith.CmpIPredicate, kind), a, b)


def plus(a: Value, b: Value | int) -> Value:
    return arith.addi(a, int32(b) if isinstance(b, int) else b)


def times(a: Value, b: int) -> Value:
    return arith.muli(a, int32(b))


def both(a: Value, b: Value | int) -> Value:
    """Bits, or booleans, that a and b have in common."""
    return arith.andi(a, int32(b) if isinstance(b, int) else b)


def flip(a: Value, b: Value | int) -> Value:
    """Exclusive or."""
    return arith.xori(a, int32(b) if isinstance(b, int) else b)


def choose(condition: Value, a: Value, b: Value) -> Value:
    return arith.select(condition, a, b)


def shift_left(word: Value, count: int) -> Value:
    return arith.shli(word, int32(count)) if count else word


def shift_right(word: Value, count: int) -> Value:
    return arith.shrui(word, int32(count)) if count else word


def choose_bits(mask: int, ones: Value, zeros: Value) -> Value:
    """Bits of `ones` where the mask has ones, else of `zeros`: one instruction."""
    return inline_ptx("lop3.b32 $0, $1, $2, $3, 0xCA;", int32(mask), ones, zeros, result_types=i32_type())


def pick_bytes(a: Value, b: Value, selector: Value | int) -> Value:
    """PRMT: nibble t of the selector names what byte t of the result is: 0-3 of a, 4-7 of b."""
    selector = int32(selector) if isinstance(selector, int) else selector
    return inline_ptx("prmt.b32 $0, $1, $2, $3;", a, b, selector, result_types=i32_type())


def fma_down(a: Value, b: Value, c: Value) -> Value:
    """a * b + c rounded once, toward minus infinity."""
    return inline_ptx("fma.rm.f32 $0, $1, $2, $3;", a, b, c, result_types=f32_type())


def fma(a: Value, b: Value, c: Value) -> Value:
    return inline_ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result_types=f32_type())


def multiply(a: Value, b: Value) -> Value:
    return inline_ptx("mul.rn.f32 $0, $1, $2;", a, b, result_types=f32_type())


def add(a: Value, b: Value) -> Value:
    return inline_ptx("add.rn.f32 $0, $1, $2;", a, b, result_types=f32_type())


def divide(a: Value, b: Value) -> Value:
    return inline_ptx("div.rn.f32 $0, $1, $2;", a, b, result_types=f32_type())


def rsqrt(a: Value) -> Value:
    return inline_ptx("rsqrt.approx.f32 $0, $1;", a, result_types=f32_type())


def at_most(a: Value, limit: float) -> Value:
    """min(a, limit); the limit where a is NaN."""
    (bits,) = struct.unpack("<I", struct.pack("<f", limit))
    return inline_ptx(f"min.f32 $0, $1, 0f{bits:08X};", a, result_types=f32_type())


def at_least(a: Value, limit: float) -> Value:
    """max(a, limit); the limit where a is NaN."""
    (bits,) = struct.unpack("<I", struct.pack("<f", limit))
    return inline_ptx(f"max.f32 $0, $1, 0f{bits:08X};", a, result_types=f32_type())


def extreme(kind: str, number: str, a: Value, b: Value) -> Value:
    """max or min that keeps NaN, of words that hold an "f32", or two of "bf16" or "f16"."""
    suffix = number if number == "f32" else number + "x2"
    constraint = f32_type() if number == "f32" else i32_type()
    a, b = (as_float(v) if number == "f32" else v for v in (a, b))
    result = inline_ptx(f"{kind}.NaN.{suffix} $0, $1, $2;", a, b, result_types=constraint)
    return as_word(result) if number == "f32" else result


def expand(number: str, word: Value) -> list[Value]:
    """The float32 numbers that a word holds, low one first."""
    if number == "f32":
        return [as_float(word)]
    if number == "bf16":
        return [as_float(shift_left(word, 16)), as_float(arith.andi(word, int32(0xFFFF0000)))]
    halves = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
    return list(inline_ptx(halves, word, result_types=(f32_type(), f32_type())))


def floor(a: Value) -> Value:
    return inline_ptx("cvt.rmi.f32.f32 $0, $1;", a, result_types=f32_type())


def float_to_int(a: Value) -> Value:
    """Of a float that is an integer."""
    return arith.fptosi(i32_type(), a)


def count_ones(word: Value) -> Value:
    return inline_ptx("popc.b32 $0, $1;", word, result_types=i32_type())


def add_bytes(word: Value, total: Value, *, signed: bool) -> Value:
    """total plus the four bytes of the word."""
    kind = "s32" if signed else "u32"
    return inline_ptx(f"dp4a.{kind}.{kind} $0, $1, $2, $3;", word, int32(0x01010101), total, result_types=i32_type())


def exchange(word: Value, distance: int) -> Value:
    """The word of the lane whose index differs in the bit `distance`; all lanes of the warp take part."""
    ptx = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    return inline_ptx(ptx, word, result_types=i32_type(), has_side_effects=True, convergent=True)


def sum_over_warp(number: Value) -> Value:
    """The sum of int32 over a warp, in every lane."""
    ptx = "redux.sync.add.s32 $0, $1, -1;"
    return inline_ptx(ptx, number, result_types=i32_type(), has_side_effects=True, convergent=True)


def pointer(memref: Value, space: int) -> Value:
    """Where a memref begins, in GLOBAL or SHARED memory."""
    ptr = memref_ptr(memref)
    wanted = llvm.PointerType.get(space)
    return ptr if ptr.type == wanted else llvm.addrspacecast(wanted, ptr)


def advance(ptr: Value, offset: Value | int) -> Value:
    """The pointer moved by so many bytes."""
    return getelementptr(ptr, [offset], ir.IntegerType.get_signless(8))


def load(ptr: Value, words: int) -> list[Value]:
    """That many words in a row, aligned as a whole."""
    vector = ir.VectorType.get((words,), i32_type())
    loaded = llvm.load(vector, ptr, alignment=4 * words)
    return [llvm.extractelement(loaded, int32(i)) for i in range(words)]


def store(ptr: Value, words: list[Value]) -> None:
    """Writes words in a row, aligned as a whole."""
    if len(words) == 1:
        llvm.store(words[0], ptr, alignment=4)
        return
    vector = llvm.mlir_undef(ir.VectorType.get((len(words),), i32_type()))
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word, int32(i))
    llvm.store(vector, ptr, alignment=4 * len(words))
