"""Products of `PreparedArray`s whose groups have float scales: what each operand of `expanded_matmul` is."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.gemm_expanded.launch import ExpandedOperands, SummedTokens
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ScaledRecovery
from bipolar_jax.kernels.sm90.prepared_weights.token_order import words_in_order
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import STAGE
from bipolar_jax.quantize.groups import group_lengths

_EVERY_BYTE = 0x01010101


def scaled_operands(
    tokens: PackedTokens, w: PreparedArray, a_format: BipolarFormat, bias: Float[Array, " n"] | None
) -> ExpandedOperands:
    """The operands of the product of quantized activations.

    Args:
      tokens: as `quantize_and_pack` gives them of kind "int8".
      w: [k, n], with float terms; chunks of at least 32 elements, whose sums no order of tokens changes.
      a_format: of the tokens.
      bias: added to every row.
    """
    words = words_in_order(tokens.words, w.order)
    columns = ColumnTerms(
        scale=w.scale[:, 0],
        scaled_value_sums=w.number_sums[:, 0],
        bias=None if bias is None else bias.astype(jnp.float32),
    )
    return ExpandedOperands(
        SummedTokens(unsigned_words(words, a_format), _chunk_sums(words, w, a_format)),
        w,
        TokenTerms(None, tokens.zero_code, tokens.scale),
        columns,
        ScaledRecovery("int8", a_format, w.format, w.contracted_size, with_zero=a_format.bits > 1),
    )


def unsigned_words(words: UInt32[Array, "1 m words"], a_format: BipolarFormat) -> UInt32[Array, "1 m words"]:
    """Signed codes u - 2^(bits - 1) in bytes as the unsigned codes u."""
    every_bit, sign = (np.uint32(byte * _EVERY_BYTE) for byte in (a_format.max_value, a_format.code_offset))
    return (words & every_bit) ^ sign


def _chunk_sums(
    words: UInt32[Array, "1 m words"], w: PreparedArray, a_format: BipolarFormat
) -> Float[Array, "m chunks"]:
    """Sums of unsigned codes over every chunk, without what lies beyond the true K; signed codes are 0 there."""
    k, chunk = w.contracted_size, STAGE // w.chunks
    codes = lax.bitcast_convert_type(words[0], jnp.int8).reshape(words.shape[1], -1)
    padded_k = -(-k // STAGE) * STAGE
    codes = jnp.pad(codes, ((0, 0), (0, max(0, padded_k - codes.shape[1]))))[:, :padded_k]
    signed = jnp.sum(codes.reshape(codes.shape[0], -1, chunk), axis=-1, dtype=jnp.int32)
    lengths = np.pad(group_lengths(k, chunk), (0, padded_k // chunk - -(-k // chunk)))
    return (signed + a_format.code_offset * lengths[None].astype(np.int32)).astype(jnp.float32)
