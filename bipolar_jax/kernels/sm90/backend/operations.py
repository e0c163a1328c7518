"""The products of a backend, on Hopper's tensor cores: plan, quantize and pack, multiply."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import FEW_TOKENS_LIMIT, Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.group_sizes import GEMM_GROUP_SIZES
from bipolar_jax.kernels.sm90.arithmetic.operands import code_words, weight_words
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery, holds_values
from bipolar_jax.kernels.sm90.backend import expanded_products, float_products
from bipolar_jax.kernels.sm90.backend.expanded_planning import is_expanded
from bipolar_jax.kernels.sm90.backend.planning import Choice, plan_product
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.wgmma import OperandKind
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm.config import Tiling
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


class ProductOperands(NamedTuple):
    """The operands of `packed_matmul` and of `decode_matmul`, in the order in which both take them.

    Attributes:
      x_words, w_words: tokens and weights, both as bit planes or both as bytes.
      tokens, columns: what the epilogue reads for each row and for each column of the output.
      recovery: how products of words become products of values.
    """

    x_words: UInt32[Array, "x_planes m x_words"]
    w_words: UInt32[Array, "w_planes n w_words"]
    tokens: TokenTerms
    columns: ColumnTerms
    recovery: Recovery


def integer_matmul(codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat) -> Int[Array, "m n groups"]:
    """See `Backend.integer_matmul`.

    Raises:
      Unsupported: w has float scales of groups: their integer sums never leave the registers.
    """
    if is_expanded(w):
        return expanded_products.integer_matmul(codes, w, a_format)
    if w.num_groups > 1:
        raise Unsupported("the integer sums of groups do not leave the chip")
    choice = choose_kernel(codes.shape[0], w, a_format, may_split=True)
    recovery = Recovery(choice.kind, a_format, w.format, w.contracted_size, with_zero=False)
    code_sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    operands = ProductOperands(
        code_words(codes, a_format, choice.kind),
        product_words(w, choice.kind),
        TokenTerms(code_sums, jnp.zeros_like(code_sums), None),
        ColumnTerms(code_sums=w.row_sums[:, 0]),
        recovery,
    )
    return multiply_words(choice.tiling, operands, jnp.int32)[..., None]


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

    The sum of a group is exact; groups are added in float32, and the correction by the token's zero code comes last.
    With several groups the error is up to about 2^-22 of sum_g s_g |z V_g|, below the rounding of bfloat16.

    Raises:
      Unsupported: a group size that is none of GEMM_GROUP_SIZES, or with integer groups no multiple of 16; rows too
        long to quantize on chip.
    """
    if is_expanded(w):
        return expanded_products.quantized_matmul(x, w, a_format, bias, prologue, residual, activation)
    choice = choose_kernel(x.shape[0], w, a_format, may_split=True)
    tokens = quantize_and_pack(x, a_format, choice.kind, prologue=prologue, interpret=interpret_params())
    return tokens_matmul(tokens, w, a_format, bias, choice, x.dtype, residual, activation)


def tokens_matmul(
    tokens: PackedTokens,
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    choice: Choice,
    dtype: jnp.dtype,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """The product of quantized activations.

    Args:
      tokens: as `quantize_and_pack` gives them, of kind `choice.kind`.
      w: packed weights [k, n].
      a_format: of the tokens.
      bias: added to every row.
      choice: the plan of this product, see `choose_kernel`.
      dtype: of the output, and of the residual.
      residual: added to the output.
      activation: of the product with its bias.
    """
    few_tokens = isinstance(choice.tiling, DecodeTiling)
    if activation is not None and (w.num_groups > 1 or residual is not None or few_tokens):
        # These kernels have no activation in their epilogue.
        product = tokens_matmul(tokens, w, a_format, bias, choice, jnp.dtype(jnp.float32))
        return epilogue.activate_and_add(product, activation, dtype, residual)
    operands = product_operands(tokens, w, a_format, bias, choice)
    if w.num_groups == 1:
        return multiply_words(choice.tiling, operands, dtype, residual, activation)
    if few_tokens:
        product = decode_matmul(
            *operands,
            dtype,
            groups=WeightGroups(w.scale, w.row_sums, w.offset, w.group_size),
            tiling=choice.tiling,
            interpret=interpret_params(),
        )
        return _added(residual, product)
    return packed_matmul(
        *operands,
        choice.tiling,
        dtype,
        group_size=w.group_size,
        group_terms=_group_terms(w, tokens, operands.recovery),
        residual=residual,
        interpret=interpret_params(),
    )


def quantized_operands(
    x: Float[Array, "m columns"],
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    choice: Choice,
    prologue: Prologue | None = None,
) -> ProductOperands:
    """Quantizes and packs x, and brings w to the same kind of words.

    Raises:
      Unsupported: rows too long to quantize on chip.
    """
    tokens = quantize_and_pack(x, a_format, choice.kind, prologue=prologue, interpret=interpret_params())
    return product_operands(tokens, w, a_format, bias, choice)


def product_operands(
    tokens: PackedTokens,
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    choice: Choice,
) -> ProductOperands:
    """The operands of a product of quantized activations, for the kernel that `choice` names."""
    recovery = Recovery(choice.kind, a_format, w.format, w.contracted_size, with_zero=a_format.bits > 1)
    w_words = product_words(w, choice.kind)
    terms = TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale)
    return ProductOperands(tokens.words, w_words, terms, _column_terms(w, bias, choice), recovery)


def multiply_words(
    tiling: Tiling | DecodeTiling,
    operands: ProductOperands,
    dtype: jnp.dtype,
    residual: Float[Array, "m n"] | None = None,
    activation: Activation | None = None,
) -> Array:
    """The product plus the residual, by the kernel that the tiling is for: `decode_matmul` or `packed_matmul`.

    Only `packed_matmul` takes an activation, and then no residual.
    """
    options = {"dtype": dtype, "interpret": interpret_params()}
    if isinstance(tiling, DecodeTiling):
        return _added(residual, decode_matmul(*operands, tiling=tiling, **options))
    return packed_matmul(*operands, tiling=tiling, residual=residual, activation=activation, **options)


def _added(residual: Float[Array, "m n"] | None, product: Num[Array, "m n"]) -> Num[Array, "m n"]:
    """XLA adds the residual of few tokens: beside the weights it is a few bytes."""
    return product if residual is None else residual + product


def weight_only_matmul(
    x: Float[Array, "m k"],
    w: BipolarArray,
    bias: Float[Array, " n"] | None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.weight_only_matmul`.

    The weights are read once for every `most_tokens` rows of x. Their values are exact in bfloat16 and float16; sums
    are float32.

    Raises:
      Unsupported: float32 activations; of bit planes with float scales, more than FEW_TOKENS_LIMIT rows, or a group
        size other than 32, 64 or a multiple of 128; of others what `float_products` does not serve.
    """
    if is_expanded(w):
        return float_products.weight_only_matmul(x, w, bias, residual, activation)
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
    product = products[0] if len(products) == 1 else jnp.concatenate(products)
    return epilogue.activate_and_add(product, activation, x.dtype, residual)


def plan_matmul(m: int, dtype: jnp.dtype, w: BipolarArray, a_format: BipolarFormat | None) -> Plan:
    """See `Backend.plan_matmul`."""
    if a_format is None:
        return _plan_weight_only(m, dtype, w)
    if is_expanded(w):
        return expanded_products.plan_matmul(m, dtype, w, a_format)
    choice = choose_kernel(m, w, a_format, may_split=True)
    check_row(w.contracted_size, dtype)
    return Plan(describe(choice, w, a_format), choice.reason, choice.tiling)


def describe(choice: Choice, w: BipolarArray, a_format: BipolarFormat) -> str:
    """The kernel of a product in words."""
    if choice.kind == "int8":
        return f"int8 tensor cores, weights expanded from {w.bits} planes"
    kernel = f"binary tensor cores, {a_format.bits} x {w.bits} planes"
    if isinstance(choice.tiling, DecodeTiling):
        kernel += ", weights as rows"
        if choice.tiling.parts > 1:
            kernel += f", {choice.tiling.parts} times"
    return kernel


def _plan_weight_only(m: int, dtype: jnp.dtype, w: BipolarArray) -> Plan:
    """The plan for float activations. Raises Unsupported as `weight_only_matmul` says."""
    if is_expanded(w):
        return float_products.plan_matmul(m, dtype, w)
    check_dtype(dtype)
    group_size = shared_scale(w)
    check_groups(group_size)
    if not 1 <= m <= FEW_TOKENS_LIMIT:
        raise Unsupported(
            f"{m} tokens of floats are not from 1 to {FEW_TOKENS_LIMIT}: XLA's dot of dequantized weights serves them"
        )
    tiling = weight_only_tiling(min(m, most_tokens(group_size)), w.contracted_size, w.bits, group_size)
    kernel = f"{jnp.dtype(dtype).name} tensor cores, weights unpacked from {w.bits} planes in registers, as rows"
    return Plan(kernel, f"{m} tokens: bound by reading the weights", tiling)


def product_words(w: BipolarArray, kind: OperandKind) -> UInt32[Array, "planes n words"]:
    """Weights as words of the given kind; a kernel expands planes to bytes."""
    if kind == "planes":
        return weight_words(w, kind)
    return expand(w.planes, w.format, interpret=interpret_params())


def choose_kernel(m: int, w: BipolarArray, a_format: BipolarFormat, *, may_split: bool = False) -> Choice:
    """Kernel and tiling of the product of m tokens with w; `planning.plan_product` chooses.

    Where `may_split`, the output is a matrix, for which blocks may multiply parts of K.

    Raises:
      Unsupported: a group size that is none of GEMM_GROUP_SIZES.
    """
    group_size = shared_scale(w)
    if group_size is not None and group_size not in GEMM_GROUP_SIZES:
        raise Unsupported(f"groups must have 32, 64 or a multiple of 128 elements up to 1024, not {group_size}")
    sizes = m, w.planes.shape[-2], w.contracted_size
    return plan_product(*sizes, a_format, w.format, group_size, may_split=may_split)


def shared_scale(w: BipolarArray) -> int | None:
    """Elements of K that share a scale; None if all of a column do."""
    return w.group_size if w.num_groups > 1 else None


def _column_terms(w: BipolarArray, bias: Float[Array, " n"] | None, choice: Choice) -> ColumnTerms:
    """What the chosen kernel reads for each column; terms of groups are not among them."""
    if w.num_groups == 1:
        return ColumnTerms(
            code_sums=w.row_sums[:, 0],
            scale=w.scale[:, 0],
            offset=None if w.offset is None else w.offset[:, 0],
            bias=None if bias is None else bias.astype(jnp.float32),
        )
    scaled_value_sums = None
    if isinstance(choice.tiling, Tiling):
        value_sums = epilogue.value_sums(w.row_sums, w.format, group_lengths(w.contracted_size, w.group_size))
        if not holds_values(w.format):
            # The bytes are codes: 2 S + C = 2 S + (X + z' L). `_group_terms` accounts for X, this for the rest.
            value_sums -= group_lengths(w.contracted_size, w.group_size)[None]
        scaled_value_sums = jnp.sum(w.scale * value_sums.astype(jnp.float32), axis=-1)
    return ColumnTerms(scaled_value_sums=scaled_value_sums, bias=None if bias is None else bias.astype(jnp.float32))


def _group_terms(w: BipolarArray, tokens: PackedTokens, recovery: Recovery) -> GroupTerms:
    """The scale of every group; with offsets, or bytes that are codes, also the token's value sums X of every group.

    Bytes are codes where values do not fit int8. With v_w = 2 c_w + 1 the half product of a group is 2 S + C - z' V.
    The sum of the token's signed codes is C = X + z' L, with z' the token's zero code and L the group's length. So X
    takes the scale as a further offset, and V is reduced by L. Without a zero, 4 S + 2 C + V = 4 S + X - L + V.
    """
    offset = w.offset
    if not holds_values(w.format):
        offset = w.scale if offset is None else w.scale + offset
    if offset is None:
        return GroupTerms(w.scale.T)
    lengths = jnp.asarray(group_lengths(w.contracted_size, w.group_size))[None]
    codes = lax.bitcast_convert_type(tokens.words[0], jnp.int8).reshape(tokens.words.shape[1], -1)
    filler = w.num_groups * w.group_size - codes.shape[1]
    codes = jnp.pad(codes, ((0, 0), (0, max(0, filler))))[:, : w.num_groups * w.group_size]
    signed_sums = jnp.sum(codes.reshape(-1, w.num_groups, w.group_size), axis=-1, dtype=jnp.int32)
    code_sums = signed_sums + recovery.a_format.code_offset * lengths
    token_sums = recovery.token_value_sums(code_sums, tokens.zero_code[: codes.shape[0], None], lengths)
    return GroupTerms(w.scale.T, offset.T, token_sums.T.astype(jnp.float32))
