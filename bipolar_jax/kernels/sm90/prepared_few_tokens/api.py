"""Products of 1 to 64 tokens with `PreparedArray`s: what each operand of the kernel is."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS, PTX_TYPES
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensProblem, FewTokensTiling, FloatTokens
from bipolar_jax.kernels.sm90.prepared_few_tokens.launch import launch
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from bipolar_jax.kernels.sm90.prepared_weights.token_order import token_words, words_in_order
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray


def few_tokens_integers(
    codes: UInt8[Array, "m k"], w: PreparedArray, a_format: BipolarFormat, **options: Any
) -> Int[Array, "m n 1"]:
    """See `Backend.integer_matmul`: the exact sums of products of values over all of K.

    Args:
      codes: of activations, 1 to 64 rows.
      w: [k, n].
      a_format: of the activations.
      **options: `tiling`, `blocks` and `interpret`, as in `few_tokens_product`.

    Raises:
      ValueError: as `few_tokens_product`.
    """
    code_sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    product = _product(
        code_words(codes, a_format, "int8"),
        w,
        TokenTerms(code_sums, jnp.zeros_like(code_sums), None),
        ColumnTerms(code_sums=w.row_sums[:, 0]),
        ExpandedRecovery("int8", a_format, w.format, w.contracted_size, False, w.terms is not None),
        jnp.int32,
        **options,
    )
    return product[..., None]


def few_tokens_product(
    tokens: PackedTokens,
    w: PreparedArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    *,
    activation: Activation | None = None,
    residual: Float[Array, "m out"] | None = None,
    tiling: FewTokensTiling | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "m out"]:
    """The product of quantized activations, with its bias: the numbers of `gemm_expanded.arrays.tokens_product`.

    Args:
      tokens: as `quantize_and_pack` gives them of kind "int8", 1 to 64 rows.
      w: [k, n]; gated if the activation is. Columns of a gated array are in order also without an activation.
      a_format: of the tokens.
      bias: added to every row.
      dtype: of the output: float32, bfloat16 or float16.
      activation: applied to the product in float32, before the cast; a gated one makes one column of two.
      residual: added to the product once it is rounded, in `dtype`. Of a gated array only beside an activation.
      tiling: how a block divides its work; None chooses.
      blocks: persistent thread blocks, at most one a multiprocessor.
      interpret: parameters of interpret mode, for tests on a CPU.

    Raises:
      ValueError: more tokens, K whose sums exceed int32, a tiling that does not fit, or a gated activation of an array
        that is not.
    """
    columns = ColumnTerms(
        code_sums=w.row_sums[:, 0] if w.float_terms is None else None,
        scale=w.scale[:, 0],
        offset=None if w.offset is None else w.offset[:, 0],
        scaled_value_sums=None if w.float_terms is None else w.number_sums[:, 0],
        bias=None if bias is None else bias.astype(jnp.float32),
    )
    return _product(
        tokens.words,
        w,
        TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale),
        columns,
        ExpandedRecovery("int8", a_format, w.format, w.contracted_size, a_format.bits > 1, w.terms is not None),
        dtype,
        activation=activation,
        residual=residual,
        tiling=tiling,
        blocks=blocks,
        interpret=interpret,
    )


def few_tokens_floats(
    x: Float[Array, "m k"],
    w: PreparedArray,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype | None = None,
    **options: Any,
) -> Float[Array, "m out"]:
    """The product of float activations, with its bias: x times s u + o, exact, summed in float32, then scaled.

    With float scales of groups the sums of chunks are scaled, see `prepared_weights.centred_floats`.

    Args:
      x: bfloat16 or float16, 1 to 64 rows.
      w: [k, n], with groups or one scale a column, and without offsets of columns.
      bias: added to every row.
      dtype: of the output; None takes that of x.
      **options: `activation`, `residual`, `tiling`, `blocks` and `interpret`, as in `few_tokens_product`.

    Raises:
      ValueError: as `few_tokens_product`.
    """
    columns = ColumnTerms(scale=w.scale[:, 0], bias=None if bias is None else bias.astype(jnp.float32))
    recovery = FloatTokens.of(PTX_TYPES[x.dtype.name], w.contracted_size, w.format)
    words = token_words(x, w.order).reshape(1, x.shape[0], -1)
    return _product(words, w, TokenTerms(None, None, None), columns, recovery, dtype or x.dtype, **options)


def _product(
    x_words: UInt32[Array, "1 m words"],
    w: PreparedArray,
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: ExpandedRecovery | FloatTokens,
    dtype,
    *,
    activation: Activation | None = None,
    residual: Array | None = None,
    tiling: FewTokensTiling | None = None,
    blocks: int = MULTIPROCESSORS,
    interpret=None,
) -> Array:
    sums_integers = isinstance(recovery, ExpandedRecovery) and w.float_terms is None
    if sums_integers and recovery.k > recovery.most_elements:
        raise ValueError(f"sums over {recovery.k} elements exceed int32: at most {recovery.most_elements}")
    if activation is not None and activation.gated and not w.gated:
        raise ValueError(f"{activation} takes gates and values of an array that is prepared with gated=True")
    if activation is not None and not activation.gated and w.gated:
        raise ValueError(f"{activation} is of an array that is prepared without gates, not of {w}")
    m, n = x_words.shape[1], w.row_sums.shape[-2]
    if tiling is None:
        kinds = {"float_terms": w.float_terms, "rows_of_stage": 2 if isinstance(recovery, FloatTokens) else 1}
        tiling = few_tokens_tiling(m, n, recovery.k, w.bits, w.chunks, w.gated, blocks, **kinds)
    static = (w.bits, w.chunks, w.gated, activation, jnp.dtype(dtype), tiling, w.float_terms)
    problem = FewTokensProblem(m, n, recovery, *static)
    if not problem.float_tokens:
        x_words = words_in_order(x_words, w.order)
    return launch(problem, x_words[0], w, tokens, columns, residual, blocks=blocks, interpret=interpret)
