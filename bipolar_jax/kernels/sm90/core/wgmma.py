"""Hopper's warpgroup matrix instruction on packed words: bits or bytes.

`wgmma.mma_async` multiplies a 64-row tile with an n-row tile, both K-major in shared memory,
32 bytes of K at a time, and adds to int32 registers:

- "planes": popcount(x AND w) over 256 bits (`m64nNk256.s32.b1.b1.and.popc`);
- "int8": sum of products of 32 signed bytes (`m64nNk32.s32.s8.s8`).

To the hardware's address generators both are the same, so tiles are uint32 words in either
case: [rows, WORDS_PER_ROW], 128 bytes of K a row, in the 128-byte swizzle that TMA writes.

The instruction is emitted by `inline_mgpu` as inline PTX with its own descriptors. Interpret
mode knows no inline PTX; the twins there compute the same integers with a dot.

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
from jaxtyping import Array, Int

from bipolar_jax.kernels.sm90.core.emulation import with_twin

OperandKind = Literal["planes", "int8"]

BYTES_PER_ROW = 128
WORDS_PER_ROW = BYTES_PER_ROW // 4
ROWS_PER_INSTRUCTION = 64
_BYTES_PER_INSTRUCTION = 32
_SWIZZLE_ROWS = 8

# How many elements of K stand in one row of a tile.
ELEMENTS_PER_ROW: dict[OperandKind, int] = {"planes": 8 * BYTES_PER_ROW, "int8": BYTES_PER_ROW}
# Kernels for few tokens load K in slices: a row of a bit plane's tile.
K_SLICE = ELEMENTS_PER_ROW["planes"]

# Rows are as wide as the swizzle, so that no further tiling is needed, and none of its constraints
# on the operands' sizes.
TILE_TRANSFORMS = (plgpu.SwizzleTransform(BYTES_PER_ROW),)

# The layout of the accumulator registers (PTX ISA, figure of wgmma's D fragment). The innermost
# tile of one keeps every register a scalar: LLVM packs pairs into 64-bit registers, and taking
# them apart before each instruction makes ptxas wait for the one before.
ACCUMULATOR = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)

_MNEMONIC: dict[OperandKind, str] = {"planes": "k256.s32.b1.b1.and.popc", "int8": "k32.s32.s8.s8"}


def is_legal_width(n: int) -> bool:
    """Whether the integer instructions come this wide: 8, 16, 24, 32, 48, 64, ... 256."""
    return 8 <= n <= 256 and n % (8 if n <= 32 else 16) == 0


def zeros(m: int, n: int) -> Int[Array, "m n"]:
    """An accumulator of zeros; `begin` with it before the first instruction."""
    return plgpu.layout_cast(jnp.zeros((m, n), jnp.int32), ACCUMULATOR)


@with_twin(lambda acc: acc)
def begin(acc: Int[Array, "m n"]) -> Int[Array, "m n"]:
    """Orders ordinary writes of the accumulator before the instructions that follow.

    Arithmetic on registers is pure to LLVM, which would otherwise move it past their fence.
    """

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=_accumulator_type(acc.shape))
    def barrier(_, acc):
        return mgpu.fragmented_array.optimization_barrier(acc)

    return barrier(acc)


def _accumulate_twin(acc, x_tile, w_tile, kind, *, part=(0, 1), block_rows=ROWS_PER_INSTRUCTION):
    return acc + _start_twin(acc.shape, x_tile, w_tile, kind, part=part, block_rows=block_rows)


@with_twin(_accumulate_twin)
def accumulate(
    acc: Int[Array, "m n"],
    x_tile,
    w_tile,
    kind: OperandKind,
    *,
    part: tuple[int, int] = (0, 1),
    block_rows: int = ROWS_PER_INSTRUCTION,
) -> Int[Array, "m n"]:
    """Starts acc += x_tile . w_tile over one 128-byte row of K, as one group of instructions.

    Asynchronous: until `settle` (or a `wgmma_wait` that covers this group) neither may the
    result be read nor the tiles be overwritten.

    Args:
      acc: [m, n] in the layout ACCUMULATOR, m a multiple of 64, n of a width that `is_legal_width`.
      x_tile: shared-memory ref, uint32 [m, WORDS_PER_ROW], with TILE_TRANSFORMS.
      w_tile: likewise [n, WORDS_PER_ROW], or with several leading axes that make n rows.
      kind: what the words hold.
      part: (i, parts) multiplies only the i-th of 1, 2 or 4 equal parts of the row; i may be traced.
      block_rows: rows of x_tile for each 64 of the accumulator; of fewer the other rows' sums have no meaning,
        what follows the tile being multiplied instead, and there must be memory.
    """
    _check_width(acc.shape[1])
    index, parts = part

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATOR, *_operand_types(), plgpu.Layout.WG_SPLAT), return_type=_accumulator_type(acc.shape)
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
    """`accumulate` from zero, without registers to be cleared before."""
    _check_width(shape[1])
    index, parts = part

    @plgpu.inline_mgpu(arg_types=(*_operand_types(), plgpu.Layout.WG_SPLAT), return_type=_accumulator_type(shape))
    def instructions(_, x_tile, w_tile, index):
        layout = ACCUMULATOR.to_mgpu()
        nothing = np.full(layout.registers_shape(shape), None, dtype=object)
        registers = _issue(nothing, x_tile, w_tile, kind, index, parts, shape[1], block_rows)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return instructions(x_tile, w_tile, jnp.int32(index))


@with_twin(lambda acc, *, in_flight=0: acc)
def settle(acc: Int[Array, "m n"], *, in_flight: int = 0) -> Int[Array, "m n"]:
    """Waits for all groups of instructions but the `in_flight` last; what it returns may be read.

    Those last must have other accumulators.
    """

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=_accumulator_type(acc.shape))
    def wait(_, acc):
        nvvm.wgmma_wait_group_sync_aligned(in_flight)
        # Nothing else ties a read of the registers to the wait: LLVM would move it up.
        return mgpu.fragmented_array.optimization_barrier(acc)

    return wait(acc)


def _check_width(n: int) -> None:
    if not is_legal_width(n):
        raise ValueError(f"no instruction has {n} columns: choose 8, 16, 24, 32, 48 or a multiple of 16 up to 256")


def _operand_types() -> tuple[plgpu.RefType, plgpu.RefType]:
    return plgpu.RefType(TILE_TRANSFORMS), plgpu.RefType(TILE_TRANSFORMS)


def _accumulator_type(shape: tuple[int, int]) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=ACCUMULATOR)


def _product_in_jnp(x_tile, w_tile, kind: OperandKind, part: tuple[int, int]) -> Int[Array, "m n"]:
    words = WORDS_PER_ROW // part[1]
    x, w = (
        jax.lax.dynamic_slice_in_dim(tile[...].reshape(-1, WORDS_PER_ROW), part[0] * words, words, axis=1)
        for tile in (x_tile, w_tile)
    )
    # The hardware reads through the async proxy; to the race detector this was an ordinary read,
    # which the next TMA write would not be ordered after.
    plgpu.commit_smem()
    if kind == "planes":
        index = jax.lax.broadcasted_iota(jnp.uint32, (1, 1, 32), 2)
        x, w = ((tile[..., None] >> index) & 1 for tile in (x, w))
    else:
        x, w = (jax.lax.bitcast_convert_type(tile, jnp.int8) for tile in (x, w))
    # A row sums at most 1024 ones or 128 * 128^2: exact in float32, whose dot is the fast one on CPUs.
    x, w = (tile.reshape(tile.shape[0], -1).astype(jnp.float32) for tile in (x, w))
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))).astype(jnp.int32)


def _with_empty_rows(product: Int[Array, "rows n"], block_rows: int) -> Int[Array, "m n"]:
    """Every `block_rows` of a product filled up to 64."""
    blocks = product.reshape(-1, block_rows, product.shape[1])
    filled = jnp.pad(blocks, ((0, 0), (0, ROWS_PER_INSTRUCTION - block_rows), (0, 0)))
    return filled.reshape(-1, product.shape[1])


def _descriptor(tile: ir.Value) -> ir.Value:
    """Matrix descriptor of a K-major tile in the 128-byte swizzle (PTX ISA, "Matrix descriptor").

    Bits 0-13: address / 16. Bits 16-29, the leading offset, are not used in this mode. Bits
    32-45: distance of 8-row groups / 16. Bits 62-63: 1 for the 128-byte swizzle.
    """
    i64 = ir.IntegerType.get_signless(64)
    constant = lambda value: arith.constant(i64, value)  # noqa: E731
    shape = ir.MemRefType(tile.type).shape
    strides, _ = ir.MemRefType(tile.type).get_strides_and_offset()
    if shape[-1] != WORDS_PER_ROW or list(strides) != [math.prod(shape[i + 1 :]) for i in range(len(shape))]:
        raise ValueError(f"a tile must be contiguous rows of {WORDS_PER_ROW} words, got {tile.type}")
    address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(tile))
    encoded_address = llvm.lshr(llvm.and_(address, constant(0x3FFFF)), constant(4))
    high = (_SWIZZLE_ROWS * BYTES_PER_ROW >> 4) | (1 << 30)
    return llvm.or_(encoded_address, arith.shli(constant(high), constant(32)))


def _advanced(descriptor: ir.Value, offset: int) -> ir.Value:
    """The descriptor of a tile `offset` bytes further on."""
    if offset == 0:
        return descriptor
    increment = arith.constant(ir.IntegerType.get_signless(64), offset >> 4)
    return llvm.add(descriptor, increment, overflow_flags=llvm.IntegerOverflowFlags.none)


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
    """The instructions of the index-th of `parts` parts of a row; registers of None start from zero.

    The registers' leading axis are the 64-row blocks of the accumulator.
    """
    registers = registers.copy()
    i64 = ir.IntegerType.get_signless(64)
    start = llvm.mul(
        arith.extui(i64, index.registers.item()),
        arith.constant(i64, BYTES_PER_ROW // parts >> 4),
        overflow_flags=llvm.IntegerOverflowFlags.none,
    )
    x_descriptor, w_descriptor = (
        llvm.add(_descriptor(tile), start, overflow_flags=llvm.IntegerOverflowFlags.none) for tile in (x_tile, w_tile)
    )
    block_stride = block_rows * BYTES_PER_ROW
    steps = BYTES_PER_ROW // _BYTES_PER_INSTRUCTION // parts
    nvvm.wgmma_fence_aligned()
    for step in range(steps):
        for block in range(registers.shape[0]):
            registers[block] = _wgmma(
                registers[block],
                _advanced(x_descriptor, block * block_stride + step * _BYTES_PER_INSTRUCTION),
                _advanced(w_descriptor, step * _BYTES_PER_INSTRUCTION),
                n,
                kind,
            )
    nvvm.wgmma_commit_group_sync_aligned()
    return registers


def _wgmma(
    registers: np.ndarray, x_descriptor: ir.Value, w_descriptor: ir.Value, n: int, kind: OperandKind
) -> np.ndarray:
    """One instruction; `registers` are the n / 2 accumulators that a thread has of 64 rows, or None for zeros."""
    i32 = ir.IntegerType.get_signless(32)
    vector_type = ir.VectorType.get((1,), i32)
    count = n // 2
    assert registers.size == count
    add = registers.flat[0] is not None
    # Outputs come first, then the inputs tied to them, then the descriptors and the predicate. A sum
    # that starts has no such inputs: what the registers held before is dead, and ptxas may know it.
    tied = list(registers.flat) if add else []
    outputs = ",".join(f"${i}" for i in range(count))
    x_operand, w_operand, add_operand = (f"${count + len(tied) + i}" for i in range(3))
    ptx = (
        f"{{ .reg .pred p; setp.ne.b32 p, {add_operand}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}{_MNEMONIC[kind]} "
        f"{{{outputs}}}, {x_operand}, {w_operand}, p; }}\n"
    )
    constraints = ",".join(["=r"] * count + [str(i) for i in range(len(tied))] + ["l", "l", "n"])
    add_flag = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, int(add))).result
    results = llvm.inline_asm(
        llvm.StructType.get_literal([vector_type] * count),
        [*tied, x_descriptor, w_descriptor, add_flag],
        ptx,
        constraints,
        asm_dialect=0,
        has_side_effects=True,
    )
    out = np.empty(registers.shape, dtype=object)
    out.flat = [llvm.extractvalue(vector_type, results, [i]) for i in range(count)]
    return out
