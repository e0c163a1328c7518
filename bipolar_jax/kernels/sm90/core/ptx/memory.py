"""Loads, stores and fences."""

from __future__ import annotations

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, inline_ptx, memref_ptr
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from bipolar_jax.kernels.sm90.core.ptx.types import Pointer, Value, i32_type, int32


def pointer(memref: Value, space: int) -> Pointer:
    """The address of an array in GLOBAL or SHARED memory."""
    ptr, wanted = memref_ptr(memref), llvm.PointerType.get(space)
    return ptr if ptr.type == wanted else llvm.addrspacecast(wanted, ptr)


def advance(ptr: Pointer, offset: Value | int) -> Pointer:
    """The pointer moved by `offset` bytes, fewer than 2^31."""
    return getelementptr(ptr, [offset], ir.IntegerType.get_signless(8))


def advance_far(ptr: Pointer, count: Value | int, size: int) -> Pointer:
    """The pointer moved by count * size bytes, computed in 64 bits; count is not negative."""
    i64 = ir.IntegerType.get_signless(64)
    if isinstance(count, int):
        return advance(ptr, mgpu.c(count * size, i64))
    return advance(ptr, arith.muli(arith.extui(i64, count), mgpu.c(size, i64)))


def load(ptr: Pointer, words: int) -> list[Value]:
    """Consecutive words in one load, aligned to their total size."""
    loaded = llvm.load(ir.VectorType.get((words,), i32_type()), ptr, alignment=4 * words)
    return [llvm.extractelement(loaded, int32(i)) for i in range(words)]


def store(ptr: Pointer, words: list[Value]) -> None:
    """Writes consecutive words in one store, aligned to their total size."""
    if len(words) == 1:
        llvm.store(words[0], ptr, alignment=4)
        return
    vector = llvm.mlir_undef(ir.VectorType.get((len(words),), i32_type()))
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word, int32(i))
    llvm.store(vector, ptr, alignment=4 * len(words))


def load_matrices(ptr: Pointer) -> list[Value]:
    """Loads four matrices of 8 x 8 16-bit elements from shared memory; all lanes take part.

    Lane 8 i + r points to row r of matrix i, 16 bytes. Word i of lane 4 r + q is word q of row r of matrix i.
    """
    ptx = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    return list(inline_ptx(ptx, ptr, result_types=(i32_type(),) * 4, has_side_effects=True, convergent=True))


def load_transposed(ptr: Pointer) -> list[Value]:
    """Loads four matrices of 8 x 8 16-bit elements from shared memory, each transposed; all lanes take part.

    Lane 8 i + r points to row r of matrix i, 16 bytes. Word i of lane 4 c + q holds elements 2 q and 2 q + 1 of column
    c of matrix i.
    """
    ptx = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    return list(inline_ptx(ptx, ptr, result_types=(i32_type(),) * 4, has_side_effects=True, convergent=True))


def prefetch(ptr: Pointer) -> None:
    """Prefetches the line at an address of global memory into the L2 cache."""
    inline_ptx("prefetch.global.L2 [$0];", ptr, has_side_effects=True)


def load_half(ptr: Pointer) -> Value:
    """Loads 16 bits, aligned, zero-extended to a word."""
    return arith.extui(i32_type(), llvm.load(ir.IntegerType.get_signless(16), ptr, alignment=2))


def store_half(ptr: Pointer, word: Value) -> None:
    """Writes the word's low 16 bits, aligned."""
    llvm.store(arith.trunci(ir.IntegerType.get_signless(16), word), ptr, alignment=2)


def store_byte(ptr: Pointer, word: Value) -> None:
    """Writes the word's low byte."""
    llvm.store(arith.trunci(ir.IntegerType.get_signless(8), word), ptr, alignment=1)


def add_shared(ptr: Pointer, word: Value) -> None:
    """Adds a word to one in shared memory, atomically."""
    inline_ptx("red.relaxed.cta.shared::cta.add.u32 [$0], $1;", ptr, word, has_side_effects=True)


def add_global(ptr: Pointer, word: Value) -> None:
    """Adds a word to one in global memory, atomically."""
    inline_ptx("red.relaxed.gpu.global.add.u32 [$0], $1;", ptr, word, has_side_effects=True)


def take_shared(ptr: Pointer) -> Value:
    """The word in shared memory, which becomes 0; one instruction: LLVM moved a load behind the store that followed."""
    ptx = "atom.relaxed.cta.shared::cta.exch.b32 $0, [$1], $2;"
    return inline_ptx(ptx, ptr, int32(0), result_types=i32_type(), has_side_effects=True)


def order_before_copies() -> None:
    """Orders this thread's accesses of shared memory before later ones of the async proxy (TMA, wgmma)."""
    inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)


def fence_gpu() -> None:
    """Orders this thread's accesses of global memory before and after it, as other blocks see them."""
    inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)
