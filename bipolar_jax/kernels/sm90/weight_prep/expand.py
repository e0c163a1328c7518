"""Bit planes of weights expanded to signed bytes, for products on the int8 tensor cores.

Computes the bytes of `expand_planes` in a kernel. XLA fuses that well too, but where layers are stacked and scanned it
reads the planes of a layer from a copy; a kernel gets the address of the slice.

In two's complement every bit of a byte is a plane, or an inverted plane. With n planes the value

    v = 2 u - (2^n - 1) = 2 (u - 2^(n-1)) + 1

is, from the low bit up: a one, the code's bits with the top one inverted, and the inverted top bit again as the sign up
to bit 7. With 8 bits the byte is the code less 2^7: the code with its top bit inverted. So each byte of the planes'
words is a column of an 8 x 8 matrix of bits, and expanding transposes it.

Two lanes share a word of the planes and the eight words it expands to: a warp stores 512 consecutive bytes.
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
from bipolar_jax.kernels.sm90.core.branches import when
from bipolar_jax.kernels.sm90.core.emulation import launch_kernel, with_twin
from bipolar_jax.kernels.sm90.core.fragments import SPLAT, scalar_of
from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.core.ptx import Value

_BYTE_WORDS = 8  # words of bytes that a word of every plane expands to
_TURN_WORDS = WARPGROUP // 2  # words of a plane that a warpgroup expands at a time
_MOST_LOADS, _MOST_TURNS = 16, 8  # loads in flight per thread; more cost registers and occupancy
_LOW_NIBBLES = 0x0F0F0F0F


def expand(
    planes: UInt32[Array, "planes n words"],
    number_format: BipolarFormat,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> UInt32[Array, "1 n byte_words"]:
    """The words of `expand_planes`: eight for one word of every plane.

    Args:
      planes: any n and number of words, at least one of each.
      number_format: 1 to 8 bits or ternary.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: another number of planes than the format has.
    """
    bits, n, words = planes.shape
    if bits != number_format.bits:
        raise ValueError(f"{number_format} has {number_format.bits} planes, got {bits}")
    # Rows are contiguous in both arrays, so the kernel takes them as one.
    expansion = Expansion(number_format, n * words)

    def kernel(planes, out):
        _expand_block(expansion, lax.axis_index("block"), planes, out)

    flat = launch_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((_BYTE_WORDS * n * words,), jnp.uint32),
        grid=(expansion.blocks,),
        grid_names=("block",),
        kernel_name="expand_weights",
        interpret=interpret,
        # No barriers: threads share no memory.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(planes.reshape(bits, n * words))
    return flat.reshape(1, n, _BYTE_WORDS * words)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How the words of the planes are divided among blocks.

    Attributes:
      number_format: of the planes.
      words: words of one plane.
    """

    number_format: BipolarFormat
    words: int

    @property
    def turns(self) -> int:
        """How many groups of words a thread loads, all at once, before it expands them one by one."""
        return min(1 << (_MOST_LOADS // self.number_format.bits).bit_length() - 1, _MOST_TURNS)

    @property
    def block_words(self) -> int:
        """Words of a plane that a block expands."""
        return self.turns * _TURN_WORDS

    @property
    def blocks(self) -> int:
        return -(-self.words // self.block_words)

    @property
    def words_of_last_block(self) -> int:
        return self.words - (self.blocks - 1) * self.block_words

    def expand_block(self, block: Value, planes: Value, out: Value) -> None:
        """Expands a block's words.

        Args:
          block: index of the block, int32; addresses are computed from it in 64 bits.
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
            if partial:  # a block has at least one word, its first
                position = ptx.choose(inside[turn], position, ptx.int32(0))
            address = ptx.advance(source, ptx.times(position, 4))
            loaded.append([ptx.load(ptx.advance_far(address, i, 4 * self.words), 1)[0] for i in range(bits)])
        for turn, plane_words in enumerate(loaded):
            with ptx.when(inside[turn]) if partial else contextlib.nullcontext():
                address = ptx.advance(target, turn * 4 * _BYTE_WORDS * _TURN_WORDS)
                ptx.store(address, half_of_bytes(plane_words, half, self.number_format))


def half_of_bytes(planes: list[Value], half: Value, number_format: BipolarFormat) -> list[Value]:
    """Four of the eight words that a word of every plane expands to: the first ones, or the last ones if half is 1.

    Byte t of word j is element 8 t + j, so a half comes from the low or from the high nibbles of the planes' bytes.
    """
    shift = ptx.shift_left(half, 2)
    rows = byte_planes([ptx.shift_right(plane, shift) for plane in planes], number_format)
    # Each byte's matrix of 8 x 4 bits becomes two of 4 x 4, side by side.
    pairs = zip(rows[:4], rows[4:], strict=True)
    return transpose_to_planes([ptx.choose_bits(_LOW_NIBBLES, low, ptx.shift_left(high, 4)) for low, high in pairs])


def byte_planes(planes: list[Value], number_format: BipolarFormat) -> list[Value]:
    """The bytes of `expand_planes` as bit planes: word i holds bit i of every element's byte."""
    ones = ptx.int32(0xFFFFFFFF)
    if number_format.ternary:
        # The byte is -2, 0 or 2: twice the number of bits set, less 2.
        either, both = ptx.either_bits(*planes), ptx.bits_of(*planes)
        none = ptx.flip_bits(either, ones)
        return [ptx.int32(0), ptx.either_bits(none, both), *[none] * 6]
    *low, top = planes
    inverted = ptx.flip_bits(top, ones)
    if not holds_values(number_format):
        return [*low, inverted]
    return [ones, *low, *[inverted] * (8 - len(planes))]


def _expand_block_twin(expansion: Expansion, block, planes, out) -> None:
    start, last = block * expansion.block_words, expansion.blocks - 1

    def write(count):
        plane_words = planes[:, pl.ds(start, count)]
        expanded = expand_planes(plane_words[:, None, :], expansion.number_format)
        out[pl.ds(start * _BYTE_WORDS, count * _BYTE_WORDS)] = expanded.reshape(-1)

    when(block < last)(lambda: write(expansion.block_words))
    when(block == last)(lambda: write(expansion.words_of_last_block))


@with_twin(_expand_block_twin)
def _expand_block(expansion: Expansion, block, planes, out) -> None:
    """`Expansion.expand_block` on refs."""

    @plgpu.inline_mgpu(arg_types=(SPLAT, plgpu.RefType(), plgpu.RefType()))
    def inline(_, block, planes, out):
        expansion.expand_block(scalar_of(block), planes, out)

    inline(block, planes, out)
