"""Prompts with prepared weights whose groups have float scales, which are expanded in memory.

Groups of a multiple of 64 elements take `gemm_expanded` instead, unless `expanded_planning.SCALES_SUMS_IN_REGISTERS` is
off: then the codes of groups of a multiple of 128 become bytes in memory, and the product of tiles scales the int32
sums of each group in float32. Shorter groups would leave the tensor cores waiting for that: weights become float16 in
memory, divided by a power of two for each column, and multiply the tokens' codes less their zero, which float16 holds
exactly. Weights are rounded to 11 significant bits, tokens have 8 at most; sums are float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, GroupTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.group_sizes import GEMM_GROUP_SIZES
from bipolar_jax.kernels.sm90.arithmetic.operands import fill_up
from bipolar_jax.kernels.sm90.arithmetic.recovery import FloatRecovery, Recovery, holds_values
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES, Choice, estimated_cycles, mainloop_steps, plan_product
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.wgmma import WORDS_PER_ROW
from bipolar_jax.kernels.sm90.gemm.api import packed_matmul
from bipolar_jax.kernels.sm90.gemm_expanded.arrays import in_natural_order
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.kernels.sm90.weight_prep.expand_floats import expand_bytes
from bipolar_jax.kernels.sm90.weight_prep.expand_scaled import expand_scaled
from bipolar_jax.packing import PreparedArray
from bipolar_jax.packing.fields import STAGE
from bipolar_jax.quantize.groups import along_last, group_lengths


def scaled_tokens_matmul(
    tokens: PackedTokens,
    w: PreparedArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """The product of quantized activations of kind "int8"; see `operations.tokens_matmul` for the arguments."""
    m = tokens.words.shape[1]
    choice = plan_scaled(m, a_format, w)
    bias = None if bias is None else bias.astype(jnp.float32)
    if choice.kind == "int8":
        out_dtype = jnp.dtype(jnp.float32 if activation is not None else dtype)
        product = _grouped_bytes(tokens, w, a_format, bias, choice, out_dtype)
        return epilogue.activate_and_add(product, activation, dtype, residual)
    joined = activation if residual is None else None  # an epilogue has either of them
    numbers, exponents = float16_rows(w)
    product = packed_matmul(
        _steps(tokens, a_format, w.contracted_size, numbers.shape[1])[None],
        numbers[None],
        TokenTerms(None, None, tokens.scale * (2.0 if a_format.bits > 1 else 1.0)),
        ColumnTerms(scale=w.scale[:, 0] * epilogue.power_of_two(exponents), bias=bias),
        FloatRecovery("f16", w.contracted_size),
        choice.tiling,
        dtype if joined is not None or activation is None else jnp.dtype(jnp.float32),
        activation=joined,
        interpret=interpret_params(),
    )
    return epilogue.activate_and_add(product, None if joined is not None else activation, dtype, residual)


def plan_scaled(m: int, a_format: BipolarFormat, w: PreparedArray) -> Choice:
    """The plan of m tokens, more than few, times w."""
    n, k = w.shape[-1], w.contracted_size
    if w.group_size % STAGE == 0 and w.group_size in GEMM_GROUP_SIZES:
        return plan_product(m, n, k, a_format, w.format, w.group_size)
    steps = mainloop_steps(k, "f16", 1)
    tiling = min(CANDIDATES, key=lambda tiling: estimated_cycles(tiling, m, n, steps))
    return Choice("f16", tiling, "estimated from tile sizes")


def explain_scaled(m: int, a_format: BipolarFormat, w: PreparedArray) -> Plan:
    """The plan in words."""
    choice = plan_scaled(m, a_format, w)
    cores, wide = ("int8", "bytes") if choice.kind == "int8" else ("float16", "float16")
    weights = f"weights of {w.bits} bits in float groups of {w.group_size} expanded to {wide} in memory"
    return Plan(f"{cores} tensor cores, {weights}", choice.reason, choice.tiling)


def _grouped_bytes(
    tokens: PackedTokens, w: PreparedArray, a_format: BipolarFormat, bias, choice: Choice, dtype: jnp.dtype
) -> Float[Array, "m n"]:
    """The product of bytes whose groups are scaled in float32, see `gemm.consumer`."""
    recovery = Recovery("int8", a_format, w.format, w.contracted_size, with_zero=a_format.bits > 1)
    scale, offset = (term * w.scale for term in w.group_scales())
    lengths = along_last(group_lengths(w.contracted_size, w.group_size), 2).astype(jnp.float32)
    value_sums = w.number_sums * w.scale - jnp.sum(offset * lengths, axis=-1, keepdims=True)
    if not holds_values(w.format):
        # Bytes are codes, v_w = 2 c + 1: 2 S + C = 2 S + (X + z' L), as in `operations.group_terms`.
        value_sums = value_sums - jnp.sum(scale * lengths, axis=-1, keepdims=True)
        offset = offset + scale
    x_words = in_natural_order(fill_up(tokens.words, WORDS_PER_ROW))
    return packed_matmul(
        x_words,
        byte_rows(w),
        TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale),
        ColumnTerms(scaled_value_sums=value_sums[:, 0], bias=bias),
        recovery,
        choice.tiling,
        dtype,
        group_size=w.group_size,
        group_terms=GroupTerms(scale.T, offset.T, _token_sums(tokens, w, recovery).T),
        interpret=interpret_params(),
    )


def _token_sums(tokens: PackedTokens, w: PreparedArray, recovery: Recovery) -> Float[Array, "m groups"]:
    """Sums of each token's values over every group."""
    m = tokens.words.shape[1]
    codes = lax.bitcast_convert_type(tokens.words[0], jnp.int8).reshape(m, -1)
    filled = fill_up(codes[:, : w.num_groups * w.group_size], w.group_size)
    signed_sums = jnp.sum(filled.reshape(m, -1, w.group_size), axis=-1, dtype=jnp.int32)
    lengths = jnp.asarray(group_lengths(w.contracted_size, w.group_size))[None]
    code_sums = signed_sums + recovery.a_format.code_offset * lengths
    return recovery.token_value_sums(code_sums, tokens.zero_code[:m, None], lengths).astype(jnp.float32)


def byte_rows(w: PreparedArray) -> UInt32[Array, "1 n words"]:
    """Values, or signed codes where values do not fit a byte, as signed bytes in the order of elements."""
    rows = expand_bytes(w, interpret=interpret_params())
    return lax.bitcast_convert_type(rows.reshape(1, rows.shape[0], -1, 4), jnp.uint32)


def float16_rows(w: PreparedArray) -> tuple[Float[Array, "n padded_k"], Int[Array, " n"]]:
    """Numbers divided by 2^e of their column, in the order of elements; and e."""
    scale, offset = w.group_scales()
    exponents = epilogue.column_exponents(scale * w.format.max_value, offset) + 1
    scale, offset = (epilogue.without_exponent(term, exponents) for term in (scale, offset))
    return expand_scaled(w, scale, offset, interpret=interpret_params()), exponents


def _steps(tokens: PackedTokens, a_format: BipolarFormat, k: int, padded_k: int) -> Float[Array, "m padded_k"]:
    """Codes less their zero code, or values of one bit, in the order of elements; zero beyond K."""
    m = tokens.words.shape[1]
    words = in_natural_order(fill_up(tokens.words, WORDS_PER_ROW))[0]
    codes = lax.bitcast_convert_type(words, jnp.int8).reshape(m, -1).astype(jnp.int32)
    if a_format.bits > 1:
        steps = codes + (a_format.code_offset - tokens.zero_code[:m, None])
    else:
        steps = 2 * codes + a_format.value_shift
    inside = jnp.arange(codes.shape[1], dtype=jnp.int32)[None] < k
    return jnp.pad(jnp.where(inside, steps, 0).astype(jnp.float16), ((0, 0), (0, padded_k - codes.shape[1])))
