"""Products of `BipolarArray`s whose codes are prepared: what each operand of `expanded_matmul` is.

Nothing dispatches here yet: the kernel has not been timed.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.gemm_expanded.launch import expanded_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.layout import GROUP_UNIT, PreparedWeights, in_natural_order, prepare
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarArray


def prepare_array(w: BipolarArray, *, gated: bool = False) -> PreparedWeights:
    """The codes of w [k, n], and its integer groups, as the kernel reads them.

    Args:
      w: of 1 to 8 bits or ternary, with one scale a column or integer groups.
      gated: whether its columns are gates followed by as many values.

    Raises:
      Unsupported: float scales of groups, or groups that are no multiple of GROUP_UNIT.
    """
    if w.groups is None:
        if w.num_groups > 1:
            raise Unsupported("expanded products take integer scales of groups, not float ones")
        return prepare(w.planes, w.format, w.contracted_size, gated=gated)
    if w.group_size % GROUP_UNIT:
        raise Unsupported(f"expanded products take groups of a multiple of {GROUP_UNIT}, not {w.group_size}")
    return prepare(
        w.planes,
        w.format,
        w.contracted_size,
        group_size=w.group_size,
        group_scale=w.groups.scale,
        group_offset=w.groups.offset,
        gated=gated,
    )


def integer_product(
    codes: UInt8[Array, "m k"], w: BipolarArray, weights: PreparedWeights, a_format: BipolarFormat, **options: Any
) -> Int[Array, "m n 1"]:
    """See `Backend.integer_matmul`: the exact sums of products of values over all of K.

    Args:
      codes: of activations.
      w: [k, n]; its planes are not read.
      weights: w prepared, not gated.
      a_format: of the activations.
      **options: of `expanded_matmul`.
    """
    code_sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    product = expanded_matmul(
        _in_order(code_words(codes, a_format, "int8"), weights),
        weights,
        TokenTerms(code_sums, jnp.zeros_like(code_sums), None),
        ColumnTerms(code_sums=w.row_sums[:, 0]),
        _recovery(w, a_format, with_zero=False),
        jnp.int32,
        **options,
    )
    return product[..., None]


def tokens_product(
    tokens: PackedTokens,
    w: BipolarArray,
    weights: PreparedWeights,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    **options: Any,
) -> Float[Array, "m out"]:
    """The product of quantized activations, with its bias.

    Args:
      tokens: as `quantize_and_pack` gives them of kind "int8".
      w: [k, n]; its planes are not read.
      weights: w prepared, gated if the activation is.
      a_format: of the tokens.
      bias: added to every row.
      dtype: of the output.
      **options: of `expanded_matmul`, such as a residual or an activation.
    """
    columns = ColumnTerms(
        code_sums=w.row_sums[:, 0],
        scale=w.scale[:, 0],
        offset=None if w.offset is None else w.offset[:, 0],
        bias=None if bias is None else bias.astype(jnp.float32),
    )
    return expanded_matmul(
        _in_order(tokens.words, weights),
        weights,
        TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale),
        columns,
        _recovery(w, a_format, with_zero=a_format.bits > 1),
        dtype,
        **options,
    )


def _recovery(w: BipolarArray, a_format: BipolarFormat, *, with_zero: bool) -> ExpandedRecovery:
    return ExpandedRecovery("int8", a_format, w.format, w.contracted_size, with_zero, w.groups is not None)


def _in_order(words, weights: PreparedWeights):
    return in_natural_order(words) if weights.natural_order else words
