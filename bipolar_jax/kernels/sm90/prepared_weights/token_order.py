"""Tokens in the order in which threads multiply them with prepared weights.

Bytes lie in the order of positions (`packing.fields`). Of 16-bit floats a register of four codes becomes two pairs
(`floats.FloatExpansion`), and an instruction m16n8k16 takes the registers of one half h of a step: its first k, 2 t and
2 t + 1, are the first pair of lane t, its last ones the second. So a step of a token, 32 numbers, lies in memory as
[half, pair, lane, 2], which `ldmatrix` hands to the lanes, or as [lane, half, pair, 2], from which a lane loads its
eight numbers at once. The position 16 h + 4 t + 2 e + p of number e of pair p is that of the weight's byte. Where
positions follow floats, [half, pair, lane, 2] are the elements as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.core.hardware import TMA_ALIGNMENT
from bipolar_jax.packing.fields import STAGE, TokenOrder, elements_of, positions_of

TOKEN_WORDS = STAGE // 2  # of a stage of floats


def words_in_order(x_words: UInt32[Array, "1 m words"], order: TokenOrder) -> UInt32[Array, "1 m words"]:
    """Bytes as the quantizer gives them (`arithmetic.operands`, kind "int8") in the order of positions."""
    if order == "bytes":
        return x_words
    values = jax.lax.bitcast_convert_type(x_words, jnp.uint8).reshape(*x_words.shape[:2], -1)
    values = positions_of(elements_of(values, "bytes"), order)
    return jax.lax.bitcast_convert_type(values.reshape(*x_words.shape, 4), jnp.uint32)


def tokens_in_order(x: Float[Array, "m k"], order: TokenOrder) -> Float[Array, "m padded_k"]:
    """Tokens [half, pair, lane, 2] by step, zeros beyond K.

    Where positions follow floats this is x itself, filled up to what TMA can address.

    Args:
      x: bfloat16 or float16.
      order: that positions follow.
    """
    if order == "floats":
        return fill_up(x, TMA_ALIGNMENT // x.dtype.itemsize)
    return elements_of(positions_of(fill_up(x, STAGE), order), "floats")


def token_words(x: Float[Array, "m k"], order: TokenOrder) -> UInt32[Array, "m stages words"]:
    """`tokens_in_order` of whole stages, two numbers a word."""
    ordered = tokens_in_order(fill_up(x, STAGE), order)
    return jax.lax.bitcast_convert_type(ordered.reshape(x.shape[0], -1, TOKEN_WORDS, 2), jnp.uint32)
