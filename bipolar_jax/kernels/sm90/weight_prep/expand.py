"""Bit planes of weights expanded to signed bytes, for products on the int8 tensor cores.

The same bytes as `expand_planes` makes, by a kernel. XLA would fuse that well, but takes the planes of a layer
from a copy where layers are stacked and scanned; to a kernel it gives the address of the slice.

In two's complement every bit of a byte is a plane, or one inverted: with n planes the value

    v = 2 u - (2^n - 1) = 2 (u - 2^(n-1)) + 1

is a one below the code's bits, of which the top one is inverted, and that one again for a sign, up to bit 7. The
code of 8 bits less 2^7 is the code, its top bit inverted. So every byte of the planes' words is a column of a matrix
of bits, eight by eight, and to expand is to transpose that.

Two lanes share a word of the planes and the eight words that become of it: lanes of a warp store 512 bytes in a row.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.operands import expand_planes
from bipolar_jax.kernels.sm90.arithmetic.recovery import holds_values
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.bit_transpose import transpose_to_planes
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Value

_BYTE_WORDS = 8  # that become of a word of the planes
_TURN_WORDS = WARPGROUP // 2  # of a plane, that a warpgroup expands at a time
_MOST_LOADS, _MOST_TURNS = 16, 8  # that a thread has under way: registers, of which the fewer the more blocks run
_LOW_NIBBLES = 0x0F0F0F0F


def expand(
    planes: UInt32[Array, "planes n words"],
    number_format: BipolarFormat,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> UInt32[Array, "1 n byte_words"]:
    """The words of `expand_planes`, eight for one of every plane.

    Args:
      planes: any n and number of words, at least one of each.
      number_format: of the planes, 1 to 8 bits or ternary.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: as many planes as the format does not have.
    """
    bits, n, words = planes.shape
    if bits != number_format.bits:
        raise ValueError(f"{number_format} has {number_format.bits} planes, got {bits}")
    # Rows follow each other without gaps in both, so where they end is of no concern.
    expansion = Expansion(number_format, n * words)

    def kernel(planes, out):
        step = _expand_block if interpret is None else _emulate_block
        step(expansion, lax.axis_index("block"), planes, out)

    flat = launch_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((_BYTE_WORDS * n * words,), jnp.uint32),
        grid=(expansion.blocks,),
        grid_names=("block",),
        kernel_name="expand_weights",
        interpret=interpret,
        # Threads share nothing.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(planes.reshape(bits, n * words))
    return flat.reshape(1, n, _BYTE_WORDS * words)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How the words of the planes are shared out.

    Attributes:
      number_format: of the planes.
      words: of a plane.
    """

    number_format: BipolarFormat
    words: int

    @property
    def turns(self) -> int:
        """Times that a block's threads expand, after all their loads."""
        return min(1 << (_MOST_LOADS // self.number_format.bits).bit_length() - 1, _MOST_TURNS)

    @property
    def block_words(self) -> int:
        """Of a plane, that a block expands."""
        return self.turns * _TURN_WORDS

    @property
    def blocks(self) -> int:
        return -(-self.words // self.block_words)

    @property
    def words_of_last_block(self) -> int:
        return self.words - (self.blocks - 1) * self.block_words

    def expand_block(self, block: Value, planes: Value, out: Value) -> None:
        """What a block's threads do.

        Args:
          block: its index, int32; beyond it addresses have 64 bits.
          planes: uint32 [bits, words] in global memory.
          out: uint32 [8 * words], likewise.
        """
        bits, thread = self.number_format.bits, ptx.thread_in_warpgroup()
        first, half = ptx.shift_right(thread, 1), ptx.bits_of(thread, 1)
        source = ptx.advance_far(ptx.pointer(planes, ptx.GLOBAL), block, 4 * self.block_words)
        target = ptx.advance_far(ptx.pointer(out, ptx.GLOBAL), block, 4 * _BYTE_WORDS * self.block_words)
        target = ptx.advance(target, ptx.times(thread, 4 * _BYTE_WORDS // 2))
        partial = self.words_of_last_block < self.block_words
        positions = [ptx.plus(first, turn * _TURN_WORDS) for turn in range(self.turns)]
        if partial:
            is_last = ptx.equal(block, self.blocks - 1)
            count = ptx.choose(is_last, ptx.int32(self.words_of_last_block), ptx.int32(self.block_words))
            inside = [ptx.less(position, count) for position in positions]
        loaded = []
        for turn, position in enumerate(positions):
            if partial:  # the block's first word exists
                position = ptx.choose(inside[turn], position, ptx.int32(0))
            where = ptx.advance(source, ptx.times(position, 4))
            loaded.append([ptx.load(ptx.advance_far(where, i, 4 * self.words), 1)[0] for i in range(bits)])
        for turn, some in enumerate(loaded):
            with ptx.when(inside[turn]) if partial else contextlib.nullcontext():
                where = ptx.advance(target, turn * 4 * _BYTE_WORDS * _TURN_WORDS)
                ptx.store(where, half_of_bytes(some, half, self.number_format))


def half_of_bytes(planes: list[Value], half: Value, number_format: BipolarFormat) -> list[Value]:
    """Four of the eight words that become of a word of every plane: the first ones, or with half 1 the last.

    Byte t of word j is element 8 t + j, so those of a half come from the nibbles that are low or high in the planes.
    """
    shift = ptx.shift_left(half, 2)
    rows = byte_planes([ptx.shift_right(plane, shift) for plane in planes], number_format)
    # A square of 8 x 4 bits for each byte becomes two of 4 x 4, side by side.
    pairs = zip(rows[:4], rows[4:], strict=True)
    return transpose_to_planes([ptx.choose_bits(_LOW_NIBBLES, low, ptx.shift_left(high, 4)) for low, high in pairs])


def byte_planes(planes: list[Value], number_format: BipolarFormat) -> list[Value]:
    """What `expand_planes` makes of every element as planes: words of the eight bits of its byte, low one first."""
    ones = ptx.int32(0xFFFFFFFF)
    if number_format.ternary:
        # 2 (u - 1), u being how many of both bits are set: -1 and 1 are odd.
        either, both = ptx.either_bits(*planes), ptx.bits_of(*planes)
        none = ptx.flip_bits(either, ones)
        return [ptx.int32(0), ptx.either_bits(none, both), *[none] * 6]
    *low, top = planes
    inverted = ptx.flip_bits(top, ones)
    if not holds_values(number_format):
        return [*low, inverted]
    return [ones, *low, *[inverted] * (8 - len(planes))]


def _expand_block(expansion: Expansion, block, planes, out) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType(), plgpu.RefType()))
    def inline(_, block, planes, out):
        expansion.expand_block(block.registers.item(), planes, out)

    inline(block, planes, out)


def _emulate_block(expansion: Expansion, block, planes, out) -> None:
    start, last = block * expansion.block_words, expansion.blocks - 1

    def write(count):
        some = planes[:, pl.ds(start, count)]
        expanded = expand_planes(some[:, None, :], expansion.number_format)
        out[pl.ds(start * _BYTE_WORDS, count * _BYTE_WORDS)] = expanded.reshape(-1)

    pl.when(block < last)(lambda: write(expansion.block_words))
    pl.when(block == last)(lambda: write(expansion.words_of_last_block))
