"""Hopper's warpgroup matrix instruction on packed words, bits or bytes, and on 16-bit floats.

`wgmma.mma_async` multiplies a tile of 64 rows with a tile of n rows, both K-major in shared memory, 32 bytes of K at a
time, and accumulates in registers, int32 or of floats float32:

- "planes": popcount(x AND w) over 256 bits (`m64nNk256.s32.b1.b1.and.popc`);
- "int8": sum of products of 32 signed bytes (`m64nNk32.s32.s8.s8`);
- "bf16", "f16": sum of products of 16 floats (`m64nNk16.f32.bf16.bf16`).

The hardware addresses all alike, 128 bytes of K a row, in the 128-byte swizzle that TMA writes: a tile is uint32 words
[rows, WORDS_PER_ROW], or 64 floats a row.

Mosaic has no 1-bit operand type: the instruction is inline PTX with its own descriptors, emitted by `inline_mgpu`. The
twins compute the same integers with a dot.

Source: PTX ISA 8.0, section "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, Int, Num

from bipolar_jax.kernels.sm90.core.emulation import with_twin

OperandKind = Literal["planes", "int8", "bf16", "f16"]

BYTES_PER_ROW = 128
WORDS_PER_ROW = BYTES_PER_ROW // 4
ROWS_PER_INSTRUCTION = 64
_BYTES_PER_INSTRUCTION = 32
_SWIZZLE_ROWS = 8

# Elements of K in one row of a tile.
ELEMENTS_PER_ROW: dict[OperandKind, int] = {
    "planes": 8 * BYTES_PER_ROW,
    "int8": BYTES_PER_ROW,
    "bf16": BYTES_PER_ROW // 2,
    "f16": BYTES_PER_ROW // 2,
}
# Kernels for few tokens load K in slices: a row of a bit plane's tile.
K_SLICE = ELEMENTS_PER_ROW["planes"]

# Rows are as wide as the swizzle: no tiling transform is needed, and none of its constraints on sizes apply.
TILE_TRANSFORMS = (plgpu.SwizzleTransform(BYTES_PER_ROW),)

# The layout of the accumulator registers (PTX ISA, figure of wgmma's D fragment). The innermost tile of size 1 keeps
# every register a scalar. LLVM would pack pairs into 64-bit registers, and unpacking them before each instruction makes
# ptxas wait for the previous one.
ACCUMULATOR = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)

_MNEMONIC: dict[OperandKind, str] = {
    "planes": "k256.s32.b1.b1.and.popc",
    "int8": "k32.s32.s8.s8",
    "bf16": "k16.f32.bf16.bf16",
    "f16": "k16.f32.f16.f16",
}


def accumulator_dtype(kind: OperandKind) -> jnp.dtype:
    """int32, or float32 for floats."""
    return jnp.dtype(jnp.float32 if kind in ("bf16", "f16") else jnp.int32)


def is_legal_width(n: int, *, is_float: bool = False) -> bool:
    """Whether wgmma has n columns: 8, 16, 24, 32, 48, 64, ... 256 of integers, any multiple of 8 up to it of floats."""
    return 8 <= n <= 256 and n % (8 if is_float or n <= 32 else 16) == 0


def zeros(m: int, n: int, kind: OperandKind = "int8") -> Num[Array, "m n"]:
    """An accumulator of zeros; call `begin` before the first instruction on it."""
    return plgpu.layout_cast(jnp.zeros((m, n), accumulator_dtype(kind)), ACCUMULATOR)


@with_twin(lambda acc: acc)
def begin(acc: Num[Array, "m n"]) -> Num[Array, "m n"]:
    """Orders ordinary writes of the accumulator's registers before the following instructions.

    LLVM treats register arithmetic as pure, and would move it past the instructions' fence.
    """

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=_accumulator_type(acc.shape, acc.dtype))
    def barrier(_, acc):
        return mgpu.fragmented_array.optimization_barrier(acc)

    return barrier(acc)


def _accumulate_twin(acc, x_tile, w_tile, kind, *, part=(0, 1), block_rows=ROWS_PER_INSTRUCTION):
    return acc + _start_twin(acc.shape, x_tile, w_tile, kind, part=part, block_rows=block_rows)


@with_twin(_accumulate_twin)
def accumulate(
    acc: Num[Array, "m n"],
    x_tile,
    w_tile,
    kind: OperandKind,
    *,
    part: tuple[int, int] = (0, 1),
    block_rows: int = ROWS_PER_INSTRUCTION,
) -> Num[Array, "m n"]:
    """Starts acc += x_tile . w_tile over one 128-byte row of K, as one commit group.

    Asynchronous: before `settle` (or a `wgmma_wait` that covers this group) the result must not be read, nor the tiles
    overwritten.

    Args:
      acc: [m, n] of `accumulator_dtype` in the layout ACCUMULATOR; m is a multiple of 64, n a legal width
        (`is_legal_width`).
      x_tile: shared-memory ref, uint32 [m, WORDS_PER_ROW] or 64 floats a row, with TILE_TRANSFORMS.
      w_tile: likewise [n, WORDS_PER_ROW]; several leading axes may make up the n rows.
      kind: the type of the words' elements.
      part: (i, count) multiplies only the i-th of `count` (1, 2 or 4) equal parts of the row; i may be traced.
      block_rows: rows of x_tile for every 64 rows of the accumulator. With fewer than 64, the other rows' sums are
        meaningless: the instruction reads the memory after the tile, which must exist.
    """
    _check_width(acc.shape[1])
    index, parts = part

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATOR, *_operand_types(), plgpu.Layout.WG_SPLAT),
        return_type=_accumulator_type(acc.shape, acc.dtype),
    )
    def instructions(_, acc, x_tile, w_tile, index):
        registers = _issue(acc.registers, x_tile, w_tile, kind, index, parts, acc.shape[1], block_rows)
        return mgpu.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=acc.is_signed)

    return instructions(acc, x_tile, w_tile, jnp.int32(index))


def _start_twin(shape, x_tile, w_tile, kind, *, part=(0, 1), block_rows=ROWS_PER_INSTRUCTION):
    _check_width(shape[1])
    return _with_empty_rows(_product_in_jnp(x_tile, w_tile, kind, part), block_rows)


@with_twin(_start_twin)
def start(
    shape: tuple[int, int],
    x_tile,
    w_tile,
    kind: OperandKind,
    *,
    part: tuple[int, int] = (0, 1),
    block_rows: int = ROWS_PER_INSTRUCTION,
) -> Int[Array, "m n"]:
    """`accumulate` from zero, without clearing registers first."""
    _check_width(shape[1])
    index, parts = part

    dtype = accumulator_dtype(kind)

    @plgpu.inline_mgpu(
        arg_types=(*_operand_types(), plgpu.Layout.WG_SPLAT), return_type=_accumulator_type(shape, dtype)
    )
    def instructions(_, x_tile, w_tile, index):
        layout = ACCUMULATOR.to_mgpu()
        nothing = np.full(layout.registers_shape(shape), None, dtype=object)
        registers = _issue(nothing, x_tile, w_tile, kind, index, parts, shape[1], block_rows)
        is_signed = True if dtype == jnp.int32 else None
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)

    return instructions(x_tile, w_tile, jnp.int32(index))


@with_twin(lambda acc, *, in_flight=0: acc)
def settle(acc: Num[Array, "m n"], *, in_flight: int = 0) -> Num[Array, "m n"]:
    """Waits for all commit groups but the last `in_flight`, and returns the accumulator, which may then be read.

    The groups still in flight must have other accumulators.
    """

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=_accumulator_type(acc.shape, acc.dtype))
    def wait(_, acc):
        nvvm.wgmma_wait_group_sync_aligned(in_flight)
        # Ties reads of the registers to the wait; LLVM would move them above it.
        return mgpu.fragmented_array.optimization_barrier(acc)

    return wait(acc)


def _check_width(n: int) -> None:
    if not is_legal_width(n):
        raise ValueError(f"no instruction has {n} columns: choose 8, 16, 24, 32, 48 or a multiple of 16 up to 256")


def _operand_types() -> tuple[plgpu.RefType, plgpu.RefType]:
    return plgpu.RefType(TILE_TRANSFORMS), plgpu.RefType(TILE_TRANSFORMS)


def _accumulator_type(shape: tuple[int, int], dtype: jnp.dtype) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=ACCUMULATOR)


def _product_in_jnp(x_tile, w_tile, kind: OperandKind, part: tuple[int, int]) -> Num[Array, "m n"]:
    row = x_tile.shape[-1]
    words = row // part[1]
    x, w = (
        jax.lax.dynamic_slice_in_dim(tile[...].reshape(-1, row), part[0] * words, words, axis=1)
        for tile in (x_tile, w_tile)
    )
    # The hardware reads through the async proxy. The race detector sees an ordinary read here, which must be ordered
    # before the next TMA write.
    plgpu.commit_smem()
    if kind == "planes":
        index = jax.lax.broadcasted_iota(jnp.uint32, (1, 1, 32), 2)
        x, w = ((tile[..., None] >> index) & 1 for tile in (x, w))
    elif kind == "int8":
        x, w = (jax.lax.bitcast_convert_type(tile, jnp.int8) for tile in (x, w))
    # A row sums at most 1024 ones or 128 * 128^2: exact in float32, the fastest dot on a CPU.
    x, w = (tile.reshape(tile.shape[0], -1).astype(jnp.float32) for tile in (x, w))
    product = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return product.astype(accumulator_dtype(kind))


def _with_empty_rows(product: Num[Array, "rows n"], block_rows: int) -> Num[Array, "m n"]:
    """Every `block_rows` rows of a product, filled up to 64 with zeros."""
    blocks = product.reshape(-1, block_rows, product.shape[1])
    filled = jnp.pad(blocks, ((0, 0), (0, ROWS_PER_INSTRUCTION - block_rows), (0, 0)))
    return filled.reshape(-1, product.shape[1])


def descriptor(tile: ir.Value) -> ir.Value:
    """Matrix descriptor of a K-major tile in the 128-byte swizzle (PTX ISA, "Matrix descriptor").

    Bits 0-13: address / 16. Bits 16-29, the leading offset, are not used in this mode. Bits
    32-45: distance of 8-row groups / 16. Bits 62-63: 1 for the 128-byte swizzle.
    """
    i64 = ir.IntegerType.get_signless(64)
    constant = lambda value: arith.constant(i64, value)  # noqa: E731
    shape = ir.MemRefType(tile.type).shape
    strides, _ = ir.MemRefType(tile.type).get_strides_and_offset()
    if shape[-1] * mgpu.utils.bitwidth(ir.MemRefType(tile.type).element_type) != 8 * BYTES_PER_ROW or list(strides) != [
        math.prod(shape[i + 1 :]) for i in range(len(shape))
    ]:
        raise ValueError(f"a tile must be contiguous rows of {BYTES_PER_ROW} bytes, got {tile.type}")
    address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(tile))
    encoded_address = llvm.lshr(llvm.and_(address, constant(0x3FFFF)), constant(4))
    high = (_SWIZZLE_ROWS * BYTES_PER_ROW >> 4) | (1 << 30)
    return llvm.or_(encoded_address, arith.shli(constant(high), constant(32)))


def advanced(tile_descriptor: ir.Value, offset: int) -> ir.Value:
    """The descriptor of the tile `offset` bytes later."""
    if offset == 0:
        return tile_descriptor
    increment = arith.constant(ir.IntegerType.get_signless(64), offset >> 4)
    return llvm.add(tile_descriptor, increment, overflow_flags=llvm.IntegerOverflowFlags.none)


def _issue(
    registers: np.ndarray,
    x_tile: ir.Value,
    w_tile: ir.Value,
    kind: OperandKind,
    index: mgpu.FragmentedArray,
    parts: int,
    n: int,
    block_rows: int = ROWS_PER_INSTRUCTION,
) -> np.ndarray:
    """Emits the instructions of the index-th of `parts` parts of a row; returns the new registers.

    Args:
      registers: the leading axis is the accumulator's 64-row blocks. None starts from zero.
    """
    registers = registers.copy()
    i64 = ir.IntegerType.get_signless(64)
    start = llvm.mul(
        arith.extui(i64, index.registers.item()),
        arith.constant(i64, BYTES_PER_ROW // parts >> 4),
        overflow_flags=llvm.IntegerOverflowFlags.none,
    )
    x_descriptor, w_descriptor = (
        llvm.add(descriptor(tile), start, overflow_flags=llvm.IntegerOverflowFlags.none) for tile in (x_tile, w_tile)
    )
    block_stride = block_rows * BYTES_PER_ROW
    steps = BYTES_PER_ROW // _BYTES_PER_INSTRUCTION // parts
    nvvm.wgmma_fence_aligned()
    for step in range(steps):
        for block in range(registers.shape[0]):
            registers[block] = instruction(
                registers[block],
                [advanced(x_descriptor, block * block_stride + step * _BYTES_PER_INSTRUCTION)],
                advanced(w_descriptor, step * _BYTES_PER_INSTRUCTION),
                n,
                _MNEMONIC[kind],
            )
    nvvm.wgmma_commit_group_sync_aligned()
    return registers


def instruction(
    registers: np.ndarray, x_operand: list[ir.Value], w_descriptor: ir.Value, n: int, mnemonic: str, add=None
) -> np.ndarray:
    """One instruction.

    Args:
      registers: a thread's n / 2 accumulators of 64 rows, or None for zeros; read as zeros if `add`, an int32, is 0.
      x_operand: the descriptor of a tile of 64 rows in shared memory, or the four registers of its fragment.
      w_descriptor: of a tile of n rows.
      n: columns of the accumulator.
      mnemonic: K and types, as PTX spells them.
    """
    i32, is_float = ir.IntegerType.get_signless(32), ".f32." in mnemonic
    vector_type = ir.VectorType.get((1,), ir.F32Type.get() if is_float else i32)
    count = n // 2
    assert registers.size == count
    given = registers.flat[0] is not None
    # Operands: outputs, then the inputs tied to them, then x, the descriptor of w and the predicate. A sum that starts
    # from zero has no tied inputs, which tells ptxas that the registers' old contents are dead.
    tied = list(registers.flat) if given else []
    outputs = ",".join(f"${i}" for i in range(count))
    *x_names, w_name, add_name = (f"${count + len(tied) + i}" for i in range(len(x_operand) + 2))
    in_registers = len(x_operand) > 1
    x_text = "{" + ",".join(x_names) + "}" if in_registers else x_names[0]
    # Of floats: not negated, and K-major, which a fragment in registers is anyway.
    flags = (", 1, 1, 0" if in_registers else ", 1, 1, 0, 0") if is_float else ""
    ptx = (
        f"{{ .reg .pred p; setp.ne.b32 p, {add_name}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}{mnemonic} "
        f"{{{outputs}}}, {x_text}, {w_name}, p{flags}; }}\n"
    )
    last_constraints = ["r" if in_registers else "l"] * len(x_operand) + ["l", "n" if add is None else "r"]
    constraints = ",".join(["=f" if is_float else "=r"] * count + [str(i) for i in range(len(tied))] + last_constraints)
    add_flag = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, int(given))).result if add is None else add
    results = llvm.inline_asm(
        llvm.StructType.get_literal([vector_type] * count),
        [*tied, *x_operand, w_descriptor, add_flag],
        ptx,
        constraints,
        asm_dialect=0,
        has_side_effects=True,
    )
    out = np.empty(registers.shape, dtype=object)
    out.flat = [llvm.extractvalue(vector_type, results, [i]) for i in range(count)]
    return out
