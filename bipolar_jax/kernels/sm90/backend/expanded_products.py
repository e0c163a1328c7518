"""The products of weights that are expanded in registers: those of `PreparedArray`s and of integer groups.

Packed weights with integer groups are laid out within the call. A gated array and its activation belong together; where
one comes without the other, what is missing is a step of its own.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.sm90.backend.expanded_planning import (
    becomes_float16,
    check_layout,
    describe_expanded,
    plan_expanded,
)
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import integer_product, product_operands
from bipolar_jax.kernels.sm90.gemm_expanded.floats.arrays import step_operands
from bipolar_jax.kernels.sm90.gemm_expanded.launch import ExpandedOperands, expanded_matmul
from bipolar_jax.kernels.sm90.prepared_few_tokens.api import few_tokens_integers, few_tokens_product
from bipolar_jax.kernels.sm90.prepared_few_tokens.config import FewTokensTiling
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens, check_row, quantize_and_pack
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.packing import BipolarNumbers, PreparedArray


def integer_matmul(codes: UInt8[Array, "m k"], w: BipolarNumbers, a_format: BipolarFormat) -> Int[Array, "m n 1"]:
    """See `Backend.integer_matmul`.

    Raises:
      Unsupported: groups that are no multiple of 16 elements; float scales of groups.
    """
    w = laid_out(w)
    if w.float_terms is not None:
        raise Unsupported("the integer sums of groups do not leave the chip")
    m, interpret = codes.shape[0], interpret_params()
    tiling = plan_expanded(m, w, jnp.int32).tiling
    if isinstance(tiling, FewTokensTiling):
        return few_tokens_integers(codes, w, a_format, tiling=tiling, interpret=interpret)
    if not w.gated:
        return integer_product(codes, w, a_format, tiling=tiling, interpret=interpret)
    product = integer_product(codes, w.in_order_of_tiles(), a_format, tiling=tiling, interpret=interpret)
    return w.columns_in_order(product[..., 0])[..., None]


def quantized_matmul(
    x: Float[Array, "m columns"],
    w: BipolarNumbers,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None = None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.quantized_matmul`.

    Raises:
      Unsupported: groups that are no multiple of 16 elements; rows too long to quantize on chip.
    """
    w = laid_out(w, gated=activation is not None and activation.gated)
    tokens = quantize_and_pack(x, a_format, "int8", prologue=prologue, interpret=interpret_params())
    return expanded_tokens_matmul(tokens, w, a_format, bias, x.dtype, residual, activation)


def expanded_tokens_matmul(
    tokens: PackedTokens,
    w: PreparedArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """The product of quantized activations of kind "int8"; see `operations.tokens_matmul` for the arguments."""
    if activation is not None and activation.gated != w.gated:
        product = expanded_tokens_matmul(tokens, w, a_format, bias, jnp.dtype(jnp.float32))
        return epilogue.activate_and_add(product, activation, dtype, residual)
    if activation is not None and residual is not None:
        # An epilogue has either of them.
        return residual + expanded_tokens_matmul(tokens, w, a_format, bias, dtype, None, activation)
    m, interpret = tokens.words.shape[1], interpret_params()
    options = {"tiling": plan_expanded(m, w, dtype).tiling, "activation": activation, "interpret": interpret}
    if isinstance(options["tiling"], FewTokensTiling):
        if residual is not None and w.gated:
            return residual + few_tokens_product(tokens, w, a_format, bias, dtype, **options)
        return few_tokens_product(tokens, w, a_format, bias, dtype, residual=residual, **options)
    if w.gated and activation is None:
        if bias is not None:
            bias = w.rows_in_order_of_tiles(bias[:, None])[:, 0]
        operands = many_tokens_operands(tokens, w.in_order_of_tiles(), a_format, bias)
        product = w.columns_in_order(expanded_matmul(*operands, dtype, **options))
        return product if residual is None else residual + product
    operands = many_tokens_operands(tokens, w, a_format, bias)
    return expanded_matmul(*operands, dtype, residual=residual, **options)


def many_tokens_operands(
    tokens: PackedTokens, w: PreparedArray, a_format: BipolarFormat, bias: Float[Array, " n"] | None
) -> ExpandedOperands:
    """The operands of `gemm_expanded` for quantized activations of kind "int8"."""
    operands_of = step_operands if becomes_float16(w) else product_operands
    return operands_of(tokens, w, a_format, bias)


def plan_matmul(m: int, dtype: jnp.dtype, w: BipolarNumbers, a_format: BipolarFormat) -> Plan:
    """See `Backend.plan_matmul`."""
    choice = plan_expanded(m, w, dtype)
    check_row(w.contracted_size, dtype)
    return Plan(describe_expanded(m, w), choice.reason, choice.tiling)


def laid_out(w: BipolarNumbers, *, gated: bool = False, for_floats: bool = False) -> PreparedArray:
    """The weights as the kernel takes them; gated and for floats only if they have to be laid out here.

    Raises:
      Unsupported: groups that are no multiple of 16 elements.
    """
    check_layout(w, gated)
    return w if isinstance(w, PreparedArray) else w.prepare(gated=gated, for_floats=for_floats)
