"""Products of 16-bit floats with `PreparedArray`s: what each operand of `expanded_matmul` is."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.float_types import FLOATS
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.core.hardware import PTX_TYPES
from bipolar_jax.kernels.sm90.gemm_expanded.launch import ExpandedOperands
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedFloatRecovery
from bipolar_jax.kernels.sm90.prepared_weights.floats import unit_of_values
from bipolar_jax.kernels.sm90.prepared_weights.token_order import tokens_in_order
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import STAGE, elements_of
from bipolar_jax.packing.float_terms import lane_float_terms, pack_lane_offsets


def float_operands(x: Float[Array, "m k"], w: PreparedArray, bias: Float[Array, " n"] | None) -> ExpandedOperands:
    """The operands of the product of float activations.

    Values of integer groups, or of the format, are exact. With float scales of groups weights are rounded to x's dtype.

    Args:
      x: bfloat16 or float16.
      w: [k, n], without offsets of columns.
      bias: added to every row.
    """
    is_rounded = w.float_terms is not None
    w = below_powers_of_two(w) if is_rounded else w
    kind = PTX_TYPES[x.dtype.name]
    unit = 1.0 if is_rounded else unit_of_values(FLOATS[kind])
    recovery = ExpandedFloatRecovery(kind, w.contracted_size, w.format, w.terms is not None, True, unit=unit)
    x = tokens_in_order(x, w.order)[None]
    return ExpandedOperands(x, w, TokenTerms(None, None, None), _columns(w, bias), recovery)


def step_operands(
    tokens: PackedTokens, w: PreparedArray, a_format: BipolarFormat, bias: Float[Array, " n"] | None
) -> ExpandedOperands:
    """The operands of the product of quantized activations with float scales of groups, on float16 tensor cores.

    Tokens are their codes less their zero code, which float16 holds exactly. Weights are rounded to it.

    Args:
      tokens: as `quantize_and_pack` gives them of kind "int8".
      w: [k, n], with float terms.
      a_format: of the tokens.
      bias: added to every row.
    """
    below_one = below_powers_of_two(w)
    scale = tokens.scale * (2.0 if a_format.bits > 1 else 1.0)
    recovery = ExpandedFloatRecovery("f16", w.contracted_size, w.format, True)
    steps = token_steps(tokens, a_format, w)
    return ExpandedOperands(steps, below_one, TokenTerms(None, None, scale), _columns(below_one, bias), recovery)


def token_steps(tokens: PackedTokens, a_format: BipolarFormat, w: PreparedArray) -> Float[Array, "1 m padded_k"]:
    """Codes less their zero code, or values of one bit, as float16 in the order of `token_order`; 0 beyond K."""
    _, m, width = tokens.words.shape
    codes = lax.bitcast_convert_type(tokens.words[0], jnp.int8).reshape(m, 4 * width)
    codes = elements_of(fill_up(codes, STAGE), "bytes").astype(jnp.int32)
    if a_format.bits > 1:
        steps = codes + (a_format.code_offset - tokens.zero_code[:m, None])
    else:
        steps = 2 * codes + a_format.value_shift
    inside = jnp.arange(codes.shape[1], dtype=jnp.int32) < w.contracted_size
    return tokens_in_order(jnp.where(inside, steps, 0).astype(jnp.float16), w.order)[None]


def below_powers_of_two(w: PreparedArray) -> PreparedArray:
    """The same numbers with terms of the form "offsets": each below 2, and a power of two in the column's scale.

    Arrays of that form are prepared so.
    """
    if w.float_terms == "offsets":
        return w
    # In the order of the words: [tiles, parts, stages, chunks, rows of the part]. Only terms of blocks are transposed.
    scale, zero, offset = lane_float_terms(w.terms, w.format, w.float_terms)
    largest_value = w.format.max_value / 2  # times the scale of codes, which is twice that of values
    offset = scale * (zero + largest_value) if offset is None else offset
    largest = (jnp.max(jnp.abs(term), axis=(2, 3))[..., None] for term in (scale * largest_value, offset))
    exponents = epilogue.column_exponents(*largest) + 1
    scale, offset = (term * epilogue.power_of_two(-exponents)[:, :, None, None] for term in (scale, offset))
    # Word 4 r + 2 b + p of a part is row 64 b + 16 part + 8 p + r of the tile.
    rows = exponents.reshape(*exponents.shape[:2], 8, 2, 2).transpose(0, 3, 1, 4, 2).reshape(-1)
    factors = epilogue.power_of_two(w.columns_in_order(rows))[:, None]
    return dataclasses.replace(
        w,
        terms=pack_lane_offsets(scale, offset),
        float_terms="offsets",
        scale=w.scale * factors,
        number_sums=w.number_sums / factors,
    )


def _columns(w: PreparedArray, bias: Float[Array, " n"] | None) -> ColumnTerms:
    return ColumnTerms(scale=w.scale[:, 0], bias=None if bias is None else bias.astype(jnp.float32))
