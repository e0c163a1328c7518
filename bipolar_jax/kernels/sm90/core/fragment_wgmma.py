"""wgmma with the operand of rows in registers: unsigned bytes times bytes, or 16-bit floats, for `plgpu.inline_mgpu`.

`wgmma.mma_async.m64nNk32.s32.u8.s8`, or `.u8.u8`, reads A from four registers of each thread, and B from shared memory.
For lane 4 r + t of warp w, the first register has the bytes of row 16 w + r at k = 4 t to 4 t + 3, the second those of
the row 8 later, the third and fourth those of both rows at k + 16 (PTX ISA, "Register Fragments for wgmma.mma_async").
Of `m64nNk16.f32.bf16.bf16`, or `.f16.f16`, a register has two floats, at k = 2 t and 2 t + 1, and the last two k + 8.

An instruction in flight reads its registers: whoever writes them next waits first. ptxas sees to that, and where it
cannot tell it serializes all products (warning C7510).
"""

from __future__ import annotations

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.fragments import Fragment, element, in_register
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind, advanced, descriptor, instruction

_BYTES_PER_INSTRUCTION = 32
_FRAGMENT_REGISTERS = 4
# By the type of the tokens.
_MNEMONIC: dict[OperandKind, str] = {
    "int8": "k32.s32.u8.s8",
    "bf16": "k16.f32.bf16.bf16",
    "f16": "k16.f32.f16.f16",
}


def multiply_fragments(acc: Fragment, fragments: list[Value], tile: Value, step: int, kind: OperandKind) -> Fragment:
    """Starts acc += A . tile^T over 32 bytes of K of the tile, as one commit group.

    Args:
      acc: [m, n] of `wgmma.accumulator_dtype` in the layout `wgmma.ACCUMULATOR`.
      fragments: A's registers, four for every 64 rows of the accumulator: unsigned bytes, or floats of the kind.
      tile: uint32 [n, WORDS_PER_ROW] or 64 floats a row in shared memory, with TILE_TRANSFORMS.
      step: which 32 bytes of a row of the tile.
      kind: of the tile's numbers, signed bytes or floats.
    """
    n = acc.shape[1]
    # Without this, LLVM would compute them after the fence that makes them visible to the tensor cores.
    fragments = pinned(fragments)
    w_descriptor = advanced(descriptor(tile), step * _BYTES_PER_INSTRUCTION)
    registers = acc.registers.copy()
    nvvm.wgmma_fence_aligned()
    for block in range(registers.shape[0]):
        operands = fragments[_FRAGMENT_REGISTERS * block : _FRAGMENT_REGISTERS * (block + 1)]
        registers[block] = instruction(registers[block], operands, w_descriptor, n, _MNEMONIC[kind])
    nvvm.wgmma_commit_group_sync_aligned()
    return mgpu.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=acc.is_signed)


def start_unsigned(
    fragments: list[list[Value]],
    tile: Value,
    first_step: int,
    n: int,
    *,
    add_to: list[Value] | None = None,
    replace: list[Value] | None = None,
) -> list[Value]:
    """Starts A . tile^T of 64 rows and unsigned bytes, as one commit group.

    Args:
      fragments: A's four registers of each step of 32 bytes of K.
      tile: uint32 [n, WORDS_PER_ROW] in shared memory, with TILE_TRANSFORMS.
      first_step: which 32 bytes of a row of the tile the first step reads.
      n: columns, a legal width.
      add_to: sums of a group in flight that it is added to; None starts from zero.
      replace: settled sums whose registers the new ones take. ptxas then finishes what reads them first; otherwise it
        moves that behind the start, and takes other registers.

    Returns:
      A thread's n / 2 sums as words, in the order of PTX. Before `settled` they must not be read.
    """
    words = pinned([word for step in fragments for word in step])
    tile_descriptor = descriptor(tile)
    registers = np.full(n // 2, None, dtype=object)
    if (given := add_to or replace) is not None:
        registers[:] = [in_register(word) for word in given]
    add = hidden_zero(tile) if replace is not None else None
    nvvm.wgmma_fence_aligned()
    for step in range(len(fragments)):
        operands = words[_FRAGMENT_REGISTERS * step : _FRAGMENT_REGISTERS * (step + 1)]
        w_descriptor = advanced(tile_descriptor, (first_step + step) * _BYTES_PER_INSTRUCTION)
        registers = instruction(registers, operands, w_descriptor, n, "k32.s32.u8.u8", add)
        add = None
    nvvm.wgmma_commit_group_sync_aligned()
    return [element(register, 0) for register in registers]


def wait(*, in_flight: int) -> None:
    """Waits for all commit groups but the last `in_flight`."""
    nvvm.wgmma_wait_group_sync_aligned(in_flight)


def hidden_zero(tile: Value) -> Value:
    """An int32 that is 0, which the compiler cannot know: bit 18 of an address in shared memory, of 228 KiB."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    address = arith.trunci(i32, llvm.ptrtoint(i64, mgpu.utils.memref_ptr(tile)))
    return llvm.and_(address, arith.constant(i32, 1 << 18))


def settled(sums: list[Value], *, in_flight: int) -> list[Value]:
    """Words of `start_unsigned` that may be read: waits for all commit groups but the last `in_flight`."""
    wait(in_flight=in_flight)
    # LLVM would read the registers before the wait.
    return pinned(sums)


def pinned(numbers: list[Value]) -> list[Value]:
    """The same words or floats, computed before any instruction with side effects that follows; no instruction."""
    constraints = ["=f" if number.type == ptx.f32_type() else "=r" for number in numbers]
    results = llvm.inline_asm(
        llvm.StructType.get_literal([number.type for number in numbers]),
        numbers,
        "",
        ",".join(constraints + [str(i) for i in range(len(numbers))]),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(number.type, results, [i]) for i, number in enumerate(numbers)]
