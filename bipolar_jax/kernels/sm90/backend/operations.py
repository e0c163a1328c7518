"""The three operations of a backend, on Hopper's tensor cores."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words, weight_words
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery, holds_values
from bipolar_jax.kernels.sm90.backend.planning import MOST_DECODE_TOKENS, Choice, plan_product
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.launch import GROUP_SIZES, packed_matmul
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.groups import WeightGroups
from bipolar_jax.kernels.sm90.gemm_few_tokens.launch import decode_matmul
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens, check_row, quantize_and_pack
from bipolar_jax.kernels.sm90.weight_only.config import check_dtype, check_groups, most_tokens, weight_only_tiling
from bipolar_jax.kernels.sm90.weight_only.launch import weight_only_product
from bipolar_jax.kernels.sm90.weight_prep.expand import expand
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.groups import group_lengths


def integer_matmul(codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat) -> Int[Array, "m n groups"]:
    """See `Backend.integer_matmul`.

    Raises:
      Unsupported: w has groups, whose sums do not leave the chip.
    """
    if w.num_groups > 1:
        raise Unsupported("the integer sums of groups do not leave the chip")
    choice = _choose(codes.shape[0], w, a_format)
    recovery = Recovery(choice.kind, a_format, w.format, w.contracted_size, with_zero=False)
    code_sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    product = multiply_words(
        choice.tiling,
        code_words(codes, a_format, choice.kind),
        product_words(w, choice.kind),
        TokenTerms(code_sums, jnp.zeros_like(code_sums), None),
        ColumnTerms(code_sums=w.row_sums[:, 0]),
        recovery,
        jnp.int32,
    )
    return product[..., None]


def quantized_matmul(
    x: Float[Array, "m columns"],
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None = None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.quantized_matmul`.

    Sums of a group are exact, and groups add up in float32, the correction by the token's zero code last:
    with several groups the error is up to some 2^-22 of sum_g s_g |z V_g|, below the rounding of bfloat16.

    Raises:
      Unsupported: groups of other sizes than GROUP_SIZES; rows too long to quantize on chip.
    """
    choice = _choose(x.shape[0], w, a_format)
    tokens = quantize_and_pack(x, a_format, choice.kind, prologue=prologue, interpret=interpret_params())
    return tokens_matmul(tokens, w, a_format, bias, x.dtype, residual, activation)


def tokens_matmul(
    tokens: PackedTokens,
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """The product of activations that `quantize_and_pack` quantized, in `dtype`.

    Args:
      tokens: of the kind that `plan_product` chooses for this product.
      w: packed weights [k, n].
      a_format: of the tokens.
      bias: added to every row.
      dtype: of the output, and of the residual.
      residual: added to the output.
      activation: of the product with its bias.

    Raises:
      Unsupported: groups of other sizes than GROUP_SIZES.
    """
    choice = _choose(tokens.words.shape[1], w, a_format)
    recovery = Recovery(choice.kind, a_format, w.format, w.contracted_size, with_zero=a_format.bits > 1)
    operands = (tokens.words, product_words(w, choice.kind))
    terms = TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale)
    if activation is not None and (
        w.num_groups > 1 or residual is not None or isinstance(choice.tiling, DecodeTiling)
    ):  # no epilogue does this
        product = tokens_matmul(tokens, w, a_format, bias, jnp.dtype(jnp.float32))
        return epilogue.activate_and_add(product, activation, dtype, residual)
    if w.num_groups == 1:
        columns = column_terms(w, bias)
        return multiply_words(choice.tiling, *operands, terms, columns, recovery, dtype, residual, activation)
    if isinstance(choice.tiling, DecodeTiling):
        product = decode_matmul(
            *operands,
            terms,
            ColumnTerms(bias=None if bias is None else bias.astype(jnp.float32)),
            recovery,
            dtype,
            groups=WeightGroups(w.scale, w.row_sums, w.offset, w.group_size),
            tiling=choice.tiling,
            interpret=interpret_params(),
        )
        return _added(residual, product)
    return packed_matmul(
        *operands,
        terms,
        _grouped_columns(w, bias),
        recovery,
        choice.tiling,
        dtype,
        group_size=w.group_size,
        group_terms=_group_terms(w, tokens, recovery),
        residual=residual,
        interpret=interpret_params(),
    )


def multiply_words(
    tiling: Tiling | DecodeTiling,
    x_words: UInt32[Array, "x_planes m words"],
    w_words: UInt32[Array, "w_planes n words"],
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: Recovery,
    dtype: jnp.dtype,
    residual: Float[Array, "m n"] | None = None,
    activation: Activation | None = None,
) -> Array:
    """The product by the kernel whose tiling it is, `decode_matmul` or `packed_matmul`, plus the residual.

    Only the latter takes an activation, and no residual with it.
    """
    operands = (x_words, w_words, tokens, columns, recovery)
    options = {"dtype": dtype, "interpret": interpret_params()}
    if isinstance(tiling, DecodeTiling):
        return _added(residual, decode_matmul(*operands, tiling=tiling, **options))
    return packed_matmul(*operands, tiling=tiling, residual=residual, activation=activation, **options)


def _added(residual: Float[Array, "m n"] | None, product: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Few tokens' residual is added by XLA: it is a few numbers beside the weights."""
    return product if residual is None else residual + product


def weight_only_matmul(x: Float[Array, "m k"], w: BipolarArray, bias: Float[Array, " n"] | None) -> Float[Array, "m n"]:
    """See `Backend.weight_only_matmul`.

    Weights are read once for every `most_tokens`. Their values are exact in both dtypes; sums are float32.

    Raises:
      Unsupported: float32 activations; more than MOST_DECODE_TOKENS rows, for which XLA dequantizes the
        weights; groups of other sizes than 32, 64 or a multiple of 128.
    """
    _plan_weight_only(x.shape[0], x.dtype, w)
    wide_bias = None if bias is None else bias.astype(jnp.float32)
    words = weight_words(w, "planes")
    at_once = most_tokens(shared_scale(w))
    products = [
        weight_only_product(
            x[start : start + at_once],
            words,
            w.scale,
            w.offset,
            wide_bias,
            w.format,
            w.group_size,
            interpret=interpret_params(),
        )
        for start in range(0, x.shape[0], at_once)
    ]
    return products[0] if len(products) == 1 else jnp.concatenate(products)


def plan_matmul(m: int, dtype: jnp.dtype, w: BipolarArray, a_format: BipolarFormat | None) -> Plan:
    """See `Backend.plan_matmul`."""
    if a_format is None:
        return _plan_weight_only(m, dtype, w)
    choice = _choose(m, w, a_format)
    check_row(w.contracted_size, dtype)
    if choice.kind == "planes":
        kernel = f"binary tensor cores, {a_format.bits} x {w.bits} planes"
        if isinstance(choice.tiling, DecodeTiling):
            kernel += ", weights as rows"
            if choice.tiling.parts > 1:
                kernel += f", {choice.tiling.parts} times"
    else:
        kernel = f"int8 tensor cores, weights expanded from {w.bits} planes"
    return Plan(kernel, choice.reason, choice.tiling)


def _plan_weight_only(m: int, dtype: jnp.dtype, w: BipolarArray) -> Plan:
    """The plan for float activations. Raises Unsupported as `weight_only_matmul` says."""
    check_dtype(dtype)
    group_size = shared_scale(w)
    check_groups(group_size)
    if not 1 <= m <= MOST_DECODE_TOKENS:
        raise Unsupported(
            f"{m} tokens of floats are not from 1 to {MOST_DECODE_TOKENS}: XLA's dot of dequantized weights serves them"
        )
    tiling = weight_only_tiling(min(m, most_tokens(group_size)), w.contracted_size, w.bits, group_size)
    kernel = f"{jnp.dtype(dtype).name} tensor cores, weights unpacked from {w.bits} planes in registers, as rows"
    return Plan(kernel, f"{m} tokens: bound by reading the weights", tiling)


def product_words(w: BipolarArray, kind: OperandKind) -> UInt32[Array, "planes n words"]:
    """`weight_words`, the bytes of "int8" made by a kernel."""
    if kind == "planes":
        return weight_words(w, kind)
    return expand(w.planes, w.format, interpret=interpret_params())


def _choose(m: int, w: BipolarArray, a_format: BipolarFormat) -> Choice:
    """The plan. Raises Unsupported for groups of other sizes than GROUP_SIZES."""
    group_size = shared_scale(w)
    if group_size is not None and group_size not in GROUP_SIZES:
        raise Unsupported(f"groups must have 32, 64 or a multiple of 128 elements up to 1024, not {group_size}")
    return plan_product(m, w.planes.shape[-2], w.contracted_size, a_format, w.format, group_size)


def shared_scale(w: BipolarArray) -> int | None:
    """Elements of K that share a scale; None if all do."""
    return w.group_size if w.num_groups > 1 else None


def column_terms(w: BipolarArray, bias: Float[Array, " n"] | None) -> ColumnTerms:
    return ColumnTerms(
        code_sums=w.row_sums[:, 0],
        scale=w.scale[:, 0],
        offset=None if w.offset is None else w.offset[:, 0],
        bias=None if bias is None else bias.astype(jnp.float32),
    )


def _grouped_columns(w: BipolarArray, bias: Float[Array, " n"] | None) -> ColumnTerms:
    value_sums = epilogue.value_sums(w.row_sums, w.format, group_lengths(w.contracted_size, w.group_size))
    if not holds_values(w.format):
        # As codes, 2 S + C = 2 S + (X + z' L): see `_group_terms` for X, and here is the rest.
        value_sums -= group_lengths(w.contracted_size, w.group_size)
    return ColumnTerms(
        scaled_value_sums=jnp.sum(w.scale * value_sums, axis=-1),
        bias=None if bias is None else bias.astype(jnp.float32),
    )


def _group_terms(w: BipolarArray, tokens: PackedTokens, recovery: Recovery) -> GroupTerms:
    """Scales; and where weights have offsets, or are bytes of codes, the token's value sums X of every group.

    With codes v_w = 2 c_w + 1 a group's half product is 2 S + C - z' V, C = X + z' L being the sum of the
    token's signed codes, z' its zero code and L the group's length: X takes the scale as one more offset,
    and L lessens V. Likewise without a zero, where 4 S + 2 C + V = 4 S + X - L + V.
    """
    offset = w.offset
    if not holds_values(w.format):
        offset = w.scale if offset is None else w.scale + offset
    if offset is None:
        return GroupTerms(w.scale.T)
    lengths = jnp.asarray(group_lengths(w.contracted_size, w.group_size))
    codes = lax.bitcast_convert_type(tokens.words[0], jnp.int8).reshape(tokens.words.shape[1], -1)
    filler = w.num_groups * w.group_size - codes.shape[1]
    codes = jnp.pad(codes, ((0, 0), (0, max(0, filler))))[:, : w.num_groups * w.group_size]
    signed_sums = jnp.sum(codes.reshape(-1, w.num_groups, w.group_size), axis=-1, dtype=jnp.int32)
    code_sums = signed_sums + recovery.a_format.code_offset * lengths
    token_sums = recovery.token_value_sums(code_sums, tokens.zero_code[: codes.shape[0], None], lengths)
    return GroupTerms(w.scale.T, offset.T, token_sums.T.astype(jnp.float32))
