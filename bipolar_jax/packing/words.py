"""Bit planes packed into 32-bit words along the contracted axis."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

from bipolar_jax.format import BipolarFormat

WORD_BITS = 32
_BIT_INDEX = np.arange(WORD_BITS, dtype=np.uint32)


def num_words(k: int) -> int:
    """Number of words for one plane of a row of k codes."""
    return -(-k // WORD_BITS)


# Programs, so that an eager call makes all planes in one; within a trace they are inlined.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def pack_codes(
    codes: UInt8[Array, "*batch n k"], number_format: BipolarFormat
) -> UInt32[Array, "*batch planes n words"]:
    """Splits codes into bit planes: bit b of word w belongs to element 32 w + b.

    The last word is padded with zero bits, which add nothing to AND-popcounts and row sums.
    The words do not store k; `unpack_codes` needs it.
    """
    k = codes.shape[-1]
    words = num_words(k)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, words * WORD_BITS - k)]
    positions = _BIT_INDEX.reshape((1,) * codes.ndim + (WORD_BITS,))
    planes = []
    for plane in range(number_format.bits):
        bits = jnp.pad(number_format.bit(codes, plane), padding).reshape(*codes.shape[:-1], words, WORD_BITS)
        planes.append(jnp.sum(bits.astype(jnp.uint32) << positions, axis=-1, dtype=jnp.uint32))
    return jnp.stack(planes, axis=-3)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def unpack_codes(
    planes: UInt32[Array, "*batch planes n words"], number_format: BipolarFormat, k: int
) -> UInt8[Array, "*batch n k"]:
    """Inverse of `pack_codes`: u = sum_i p_i b_i."""
    codes = jnp.uint32(0)
    positions = _BIT_INDEX.reshape((1,) * (planes.ndim - 1) + (WORD_BITS,))
    for plane, weight in enumerate(number_format.plane_weights):
        bits = (planes[..., plane, :, :, None] >> positions) & jnp.uint32(1)
        codes = codes + bits * jnp.uint32(weight)
    *batch, n, words, _ = codes.shape
    return codes.astype(jnp.uint8).reshape(*batch, n, words * WORD_BITS)[..., :k]
