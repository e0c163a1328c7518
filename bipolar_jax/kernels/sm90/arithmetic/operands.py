"""Operands in the layout that kernels load: rows of uint32 words.

"planes" are the bit planes of `BipolarArray`. "int8" are signed bytes in an order that is cheap to make from planes:
byte t of word 8 B + j is element 32 B + 8 t + j, so that one shift and one mask take the bits of four elements out of a
word. A sum over K is the same in any order, if both operands have the same.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.recovery import holds_values
from bipolar_jax.kernels.sm90.core.hardware import ALIGNED_WORDS
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.packing import BipolarArray
from bipolar_jax.packing.words import WORD_BITS, pack_codes
from bipolar_jax.quantize.groups import along_last

_BYTE_WORDS_PER_WORD = 8  # 32 elements are one word of a plane, or eight words of bytes


def weight_words(w: BipolarArray, kind: OperandKind) -> UInt32[Array, "*layers planes n words"]:
    """w's planes, or its values as bytes; rows are filled up with zeros to whole multiples of 16 bytes."""
    return fill_up(w.planes if kind == "planes" else expand_planes(w.planes, w.format), ALIGNED_WORDS)


# Programs, so that an eager call is one; within a trace they are inlined.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def code_words(
    codes: UInt8[Array, "m k"], a_format: BipolarFormat, kind: OperandKind
) -> UInt32[Array, "planes m words"]:
    """Packs codes of activations, for products that start from codes; zeros beyond k."""
    if kind == "planes":
        return fill_up(pack_codes(codes, a_format), ALIGNED_WORDS)
    m, _ = codes.shape
    signed = fill_up(a_format.signed_codes(codes), WORD_BITS)
    in_order = signed.reshape(m, -1, 4, _BYTE_WORDS_PER_WORD).swapaxes(2, 3)
    return lax.bitcast_convert_type(in_order, jnp.uint32).reshape(1, m, -1)


def fill_up(array: Array, multiple: int) -> Array:
    """Zeros after the last axis, up to a multiple."""
    filler = -array.shape[-1] % multiple
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, filler)]) if filler else array


def vector_length(m: int) -> int:
    """Elements that vectors over m tokens are filled up to."""
    return -(-m // ALIGNED_WORDS) * ALIGNED_WORDS


@functools.partial(jax.jit, static_argnums=1, inline=True)
def expand_planes(
    planes: UInt32[Array, "planes n words"], number_format: BipolarFormat
) -> UInt32[Array, "1 n byte_words"]:
    """Values as signed bytes, or signed codes where values do not fit a byte: eight words for one word of every plane.

    Bytes beyond k are not zero: the other operand has zeros there.
    """
    shifts = along_last(jnp.arange(_BYTE_WORDS_PER_WORD, dtype=jnp.uint32), planes.ndim)
    codes = sum(
        np.uint32(weight) * ((plane[..., None] >> shifts) & _in_every_byte(1))
        for weight, plane in zip(number_format.plane_weights, planes, strict=True)
    )
    if holds_values(number_format):
        signed = _subtract_in_every_byte(2 * codes, number_format.max_value)
    else:
        signed = _subtract_in_every_byte(codes, number_format.code_offset)
    return signed.reshape(1, planes.shape[1], -1)


def pack_planes(codes: UInt8[Array, "m k"], number_format: BipolarFormat) -> UInt32[Array, "planes m words"]:
    """`pack_codes` for twins of kernels, which may not hold its constant array."""
    bits = fill_up(jnp.stack([number_format.bit(codes, plane) for plane in range(number_format.bits)]), WORD_BITS)
    return join_fields(bits.reshape(*bits.shape[:2], -1, WORD_BITS), 1)


def join_fields(fields: UInt8[Array, "*shape fields"], width: int) -> UInt32[Array, "*shape"]:
    """Words of fields of `width` bits, the first in the lowest bits."""
    shifts = along_last(jnp.arange(0, WORD_BITS, width, dtype=jnp.uint32), fields.ndim)
    return jnp.sum(fields.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)


def _in_every_byte(byte: int) -> np.uint32:
    return np.uint32(byte * 0x01010101)


def _subtract_in_every_byte(words: UInt32[Array, "..."], byte: int) -> UInt32[Array, "..."]:
    """Every byte of the words less `byte`, modulo 256.

    The top bits are set first so that no byte borrows from the next, and corrected afterwards.
    """
    top, subtrahend = _in_every_byte(0x80), _in_every_byte(byte)
    return ((words | top) - (subtrahend & ~top)) ^ ((words ^ ~subtrahend) & top)
