"""Operands as the rows of words that kernels load.

"planes" are as `BipolarArray` has them. "int8" are signed bytes in the order that is cheap to
make of planes: byte t of word 8 B + j is element 32 B + 8 t + j, so that a shift and a mask
take four elements' bits out of a word at once. Sums over K do not see the order, as long as
both operands have the same.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.recovery import holds_values
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.packing import BipolarArray
from bipolar_jax.packing.words import WORD_BITS, pack_codes

_BYTE_WORDS_PER_WORD = 8
_ROW_WORDS = 4  # TMA addresses rows of whole 16 bytes
_VECTOR_UNIT = 4  # tokens: 16 bytes, as what reads the vectors wants them


def weight_words(w: BipolarArray, kind: OperandKind) -> UInt32[Array, "planes n words"]:
    """w's planes, or its numbers as bytes."""
    return fill_up(w.planes if kind == "planes" else expand_planes(w.planes, w.format), _ROW_WORDS)


def code_words(
    codes: UInt8[Array, "m k"], a_format: BipolarFormat, kind: OperandKind
) -> UInt32[Array, "planes m words"]:
    """Packs codes of activations, for products that start from codes; zeros where k has ended."""
    if kind == "planes":
        return fill_up(pack_codes(codes, a_format), _ROW_WORDS)
    m, _ = codes.shape
    signed = fill_up(a_format.signed_codes(codes), WORD_BITS)
    in_order = signed.reshape(m, -1, 4, _BYTE_WORDS_PER_WORD).swapaxes(2, 3)
    return lax.bitcast_convert_type(in_order, jnp.uint32).reshape(1, m, -1)


def fill_up(array: Array, multiple: int) -> Array:
    """Zeros after the last axis, if need be."""
    filler = -array.shape[-1] % multiple
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, filler)]) if filler else array


def vector_length(m: int) -> int:
    """Elements of vectors over m tokens."""
    return -(-m // _VECTOR_UNIT) * _VECTOR_UNIT


def expand_planes(
    planes: UInt32[Array, "planes n words"], number_format: BipolarFormat
) -> UInt32[Array, "1 n byte_words"]:
    """Values as signed bytes, or signed codes where values do not fit a byte; eight words for one of every plane.

    What stands where k has ended is not zero: it must meet zeros in the other operand.
    """
    shifts = jnp.arange(_BYTE_WORDS_PER_WORD, dtype=jnp.uint32)
    codes = sum(
        np.uint32(weight) * ((plane[..., None] >> shifts) & _in_every_byte(1))
        for weight, plane in zip(number_format.plane_weights, planes, strict=True)
    )
    if holds_values(number_format):
        signed = _subtract_in_every_byte(2 * codes, number_format.max_value)
    else:
        signed = _subtract_in_every_byte(codes, number_format.code_offset)
    return signed.reshape(1, planes.shape[1], -1)


def _in_every_byte(byte: int) -> np.uint32:
    return np.uint32(byte * 0x01010101)


def _subtract_in_every_byte(words: UInt32[Array, "..."], byte: int) -> UInt32[Array, "..."]:
    """Every byte of the words less `byte`, modulo 256.

    The top bits are set aside so that no byte borrows from the next, and put right after.
    """
    top, subtrahend = _in_every_byte(0x80), _in_every_byte(byte)
    return ((words | top) - (subtrahend & ~top)) ^ ((words ^ ~subtrahend) & top)
