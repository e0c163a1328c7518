"""What a thread can do: a thin layer over MLIR and PTX.

Values are MLIR values of type i32 or f32; conditions are i1, and a "word" is an i32 of which
only the bits count. Whatever rounds says how: the compiler contracts and reorders none of it.
What is written in these functions alone tests can run with others in their place, which compute
the same for the 128 threads of a warpgroup in numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, inline_ptx, memref_ptr
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

Value = ir.Value
Pointer = ir.Value
GLOBAL, SHARED = 1, 3  # address spaces


def i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def f32_type() -> ir.Type:
    return ir.F32Type.get()


def int32(number: int) -> Value:
    """A constant, given signed or unsigned."""
    return mgpu.c(number - (1 << 32) if number >= 1 << 31 else number, i32_type())


def float32(number: float) -> Value:
    return mgpu.c(float(number), f32_type())


# Threads and control flow.


def thread_in_warpgroup() -> Value:
    return bits_of(mgpu.thread_idx(), 127)


def opaque(word: Value) -> Value:
    """The word, of which the compiler knows nothing; what is computed from it is not moved out of loops."""
    return inline_ptx("mov.b32 $0, $1;", word, result_types=i32_type(), has_side_effects=True)


def synchronize() -> None:
    """Waits for the whole warpgroup."""
    mgpu.warpgroup_barrier()


def when(condition: Value) -> AbstractContextManager:
    """What is emitted within happens where the condition holds."""
    return mgpu.when(condition)


def repeat(count: int, values: list[Value], body: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
    """Carries values through body(0, values), body(1, values), ..."""
    return list(mgpu.fori(int32(count), values)(body).results)


def update_if(condition: Value, values: list[Value], body: Callable[[], list[Value]]) -> list[Value]:
    """body() where the condition holds, the values as they are elsewhere."""
    branch = scf.IfOp(condition, [value.type for value in values], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.YieldOp(body())
    with ir.InsertionPoint(branch.else_block):
        scf.YieldOp(values)
    return list(branch.results)


def exchange(word: Value, distance: int) -> Value:
    """The word of the lane whose index differs in the bit `distance`; all lanes of the warp take part."""
    ptx = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    return inline_ptx(ptx, word, result_types=i32_type(), has_side_effects=True, convergent=True)


def from_lane(word: Value, lane: Value) -> Value:
    """The word of another lane; all lanes of the warp take part."""
    ptx = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
    return inline_ptx(ptx, word, lane, result_types=i32_type(), has_side_effects=True, convergent=True)


def over_warp(kind: str, word: Value) -> Value:
    """ "add", "max" or "min" of the signed words of all lanes of the warp, which take part."""
    ptx = f"redux.sync.{kind}.s32 $0, $1, -1;"
    return inline_ptx(ptx, word, result_types=i32_type(), has_side_effects=True, convergent=True)


# Integers and bits.


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
    """a // b of numbers that are not negative."""
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
    """Bits of `ones` where the mask has ones, else of `zeros`: one instruction."""
    return inline_ptx("lop3.b32 $0, $1, $2, $3, 0xCA;", int32(mask), ones, zeros, result_types=i32_type())


def masked_or(word: Value, mask: int, ones: int) -> Value:
    """The word's bits where the mask has ones, and `ones`: one instruction."""
    return inline_ptx("lop3.b32 $0, $1, $2, $3, 0xEA;", word, int32(mask), int32(ones), result_types=i32_type())


def pick_bytes(a: Value, b: Value, selector: Value | int) -> Value:
    """PRMT: nibble t of the selector names what byte t of the result is, 0-3 of a or 4-7 of b."""
    return inline_ptx("prmt.b32 $0, $1, $2, $3;", a, b, _value(selector), result_types=i32_type())


def count_ones(word: Value) -> Value:
    return inline_ptx("popc.b32 $0, $1;", word, result_types=i32_type())


def add_bytes(word: Value, total: Value, *, signed: bool) -> Value:
    """total plus the four bytes of the word."""
    ptx = "dp4a.{0}.{0} $0, $1, $2, $3;".format("s32" if signed else "u32")
    return inline_ptx(ptx, word, int32(0x01010101), total, result_types=i32_type())


# Floating point.


def as_float(word: Value) -> Value:
    return arith.bitcast(f32_type(), word)


def as_word(number: Value) -> Value:
    return arith.bitcast(i32_type(), number)


def expand(number: str, word: Value) -> list[Value]:
    """The float32 numbers that a word holds, one "f32" or two "bf16" or "f16", low one first."""
    if number == "f32":
        return [as_float(word)]
    if number == "bf16":
        return [as_float(shift_left(word, 16)), as_float(bits_of(word, 0xFFFF0000))]
    halves = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
    return list(inline_ptx(halves, word, result_types=(f32_type(), f32_type())))


def extreme(kind: str, number: str, a: Value, b: Value) -> Value:
    """ "max" or "min", NaN if either is, of words that hold numbers as in `expand`."""
    if number == "f32":
        return as_word(_float_op(f"{kind}.NaN.f32", as_float(a), as_float(b)))
    return inline_ptx(f"{kind}.NaN.{number}x2 $0, $1, $2;", a, b, result_types=i32_type())


def fma_pairs(number: str, a: Value, b: Value, c: Value) -> Value:
    """a * b + c of words that hold two "bf16" or "f16" each."""
    return inline_ptx(f"fma.rn.{number}x2 $0, $1, $2, $3;", a, b, c, result_types=i32_type())


def rounded(number: str, a: Value) -> Value:
    """A float32 as "bf16" or "f16", in the low half of a word; to nearest, ties to even."""
    ptx = f"{{.reg .b16 h; cvt.rn.{number}.f32 h, $1; mov.b32 $0, {{h, h}};}}"
    return inline_ptx(ptx, a, result_types=i32_type())


def multiply_add_tiles(number: str, a: list[Value], b: list[Value], c: list[Value]) -> list[Value]:
    """a . b + c by the warp's tensor core: [16, 16] times [16, 8] of "bf16" or "f16", in float32.

    A lane holds, with r = lane // 4 and q = lane % 4, the words of two numbers at k = 2 q and k = 2 q + 8: of a
    those of rows r, r + 8, then both again of the second k; of b those of column r; and of c columns 2 q and 2 q + 1
    of row r, then of row r + 8 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
    """
    names = [[f"${i}" for i in range(start, start + count)] for start, count in ((0, 4), (4, 4), (8, 2), (10, 4))]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in names)
    ptx = f"mma.sync.aligned.m16n8k16.row.col.f32.{number}.{number}.f32 {operands};"
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
    """1 / sqrt(a), good to 2 in the last place."""
    return _float_op("rsqrt.approx.f32", a)


def reciprocal(a: Value) -> Value:
    """1 / a, good to 1 in the last place."""
    return _float_op("rcp.approx.ftz.f32", a)


def exp2(a: Value) -> Value:
    """2^a, good to 2 in the last place; what is below 2^-126 is 0."""
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


def to_int(a: Value) -> Value:
    """int32 of a float that is an integer."""
    return arith.fptosi(i32_type(), a)


# Memory.


def pointer(memref: Value, space: int) -> Pointer:
    """Where an array in GLOBAL or SHARED memory begins."""
    ptr, wanted = memref_ptr(memref), llvm.PointerType.get(space)
    return ptr if ptr.type == wanted else llvm.addrspacecast(wanted, ptr)


def advance(ptr: Pointer, offset: Value | int) -> Pointer:
    """The pointer moved by so many bytes, below 2^31."""
    return getelementptr(ptr, [offset], ir.IntegerType.get_signless(8))


def advance_far(ptr: Pointer, count: Value | int, size: int) -> Pointer:
    """The pointer moved by count * size bytes, however many they are; count is not negative."""
    i64 = ir.IntegerType.get_signless(64)
    if isinstance(count, int):
        return advance(ptr, mgpu.c(count * size, i64))
    return advance(ptr, arith.muli(arith.extui(i64, count), mgpu.c(size, i64)))


def load(ptr: Pointer, words: int) -> list[Value]:
    """That many words in a row, aligned as a whole."""
    loaded = llvm.load(ir.VectorType.get((words,), i32_type()), ptr, alignment=4 * words)
    return [llvm.extractelement(loaded, int32(i)) for i in range(words)]


def store(ptr: Pointer, words: list[Value]) -> None:
    """Writes words in a row, aligned as a whole."""
    if len(words) == 1:
        llvm.store(words[0], ptr, alignment=4)
        return
    vector = llvm.mlir_undef(ir.VectorType.get((len(words),), i32_type()))
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word, int32(i))
    llvm.store(vector, ptr, alignment=4 * len(words))


def load_transposed(ptr: Pointer) -> list[Value]:
    """Four matrices of 8 x 8 numbers of 16 bits in shared memory, each transposed; all lanes take part.

    Lane 8 i + r points to row r of matrix i, 16 bytes. Word i of lane 4 c + q holds numbers 2 q and 2 q + 1 of column c
    of matrix i.
    """
    ptx = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    return list(inline_ptx(ptx, ptr, result_types=(i32_type(),) * 4, has_side_effects=True, convergent=True))


def prefetch(ptr: Pointer) -> None:
    """Has the L2 cache load what is there in global memory."""
    inline_ptx("prefetch.global.L2 [$0];", ptr, has_side_effects=True)


def load_half(ptr: Pointer) -> Value:
    """A word of the 16 bits there, aligned, and zeros above."""
    return arith.extui(i32_type(), llvm.load(ir.IntegerType.get_signless(16), ptr, alignment=2))


def store_half(ptr: Pointer, word: Value) -> None:
    """Writes the word's low 16 bits, aligned."""
    llvm.store(arith.trunci(ir.IntegerType.get_signless(16), word), ptr, alignment=2)


def store_byte(ptr: Pointer, word: Value) -> None:
    """Writes the word's low byte."""
    llvm.store(arith.trunci(ir.IntegerType.get_signless(8), word), ptr, alignment=1)


def order_before_copies() -> None:
    """What this thread wrote to shared memory so far comes before what TMA writes there later."""
    inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)


def _value(number: Value | int) -> Value:
    return int32(number) if isinstance(number, int) else number


def _float_op(mnemonic: str, *operands: Value | float) -> Value:
    """A float32 instruction; Python floats become immediate operands."""
    values = [v for v in operands if isinstance(v, ir.Value)]
    names = iter(f"${i + 1}" for i in range(len(values)))
    text = [
        next(names) if isinstance(v, ir.Value) else "0f{:08X}".format(*struct.unpack("<I", struct.pack("<f", v)))
        for v in operands
    ]
    return inline_ptx(f"{mnemonic} $0, {', '.join(text)};", *values, result_types=f32_type())
