"""Products of `PreparedArray`s: what each operand of `expanded_matmul` is."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.gemm_expanded.launch import ExpandedOperands, expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.gemm_expanded.scaled_arrays import scaled_operands
from bipolar_jax.kernels.sm90.prepared_weights.token_order import words_in_order
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray


def integer_product(
    codes: UInt8[Array, "m k"], w: PreparedArray, a_format: BipolarFormat, **options: Any
) -> Int[Array, "m n 1"]:
    """See `Backend.integer_matmul`: the exact sums of products of values over all of K.

    Args:
      codes: of activations.
      w: [k, n], not gated.
      a_format: of the activations.
      **options: of `expanded_matmul`.
    """
    code_sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    product = expanded_matmul(
        words_in_order(code_words(codes, a_format, "int8"), w.order),
        w,
        TokenTerms(code_sums, jnp.zeros_like(code_sums), None),
        ColumnTerms(code_sums=w.row_sums[:, 0]),
        _recovery(w, a_format, with_zero=False),
        jnp.int32,
        **options,
    )
    return product[..., None]


def tokens_product(
    tokens: PackedTokens,
    w: PreparedArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    **options: Any,
) -> Float[Array, "m out"]:
    """The product of quantized activations, with its bias.

    Args:
      tokens: as `quantize_and_pack` gives them of kind "int8".
      w: [k, n], gated if the activation is.
      a_format: of the tokens.
      bias: added to every row.
      dtype: of the output.
      **options: of `expanded_matmul`, such as a residual or an activation.
    """
    return expanded_matmul(*product_operands(tokens, w, a_format, bias), dtype, **options)


def product_operands(
    tokens: PackedTokens, w: PreparedArray, a_format: BipolarFormat, bias: Float[Array, " n"] | None
) -> ExpandedOperands:
    """The operands of the product of quantized activations; arguments as `tokens_product` has them."""
    if w.float_terms is not None:
        return scaled_operands(tokens, w, a_format, bias)
    columns = ColumnTerms(
        code_sums=w.row_sums[:, 0],
        scale=w.scale[:, 0],
        offset=None if w.offset is None else w.offset[:, 0],
        bias=None if bias is None else bias.astype(jnp.float32),
    )
    return ExpandedOperands(
        words_in_order(tokens.words, w.order),
        w,
        TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale),
        columns,
        _recovery(w, a_format, with_zero=a_format.bits > 1),
    )


def _recovery(w: PreparedArray, a_format: BipolarFormat, *, with_zero: bool) -> ExpandedRecovery:
    return ExpandedRecovery("int8", a_format, w.format, w.contracted_size, with_zero, w.terms is not None)
