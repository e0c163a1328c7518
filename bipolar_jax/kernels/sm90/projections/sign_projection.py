"""A product whose output is the one-bit tokens of the next product, and the feed-forward layer made of both.

The first product finishes its numbers as always, with activation and rounding, and stores one bit of each. A quantizer
would read 16 bits of each to do the same.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Layer, Plan
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.sm90.arithmetic.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.arithmetic.recovery import Recovery
from bipolar_jax.kernels.sm90.backend.expanded_planning import is_expanded
from bipolar_jax.kernels.sm90.backend.operations import (
    choose_kernel,
    describe,
    quantized_operands,
    shared_scale,
    tokens_matmul,
)
from bipolar_jax.kernels.sm90.backend.planning import Choice
from bipolar_jax.kernels.sm90.core.execution import interpret_params
from bipolar_jax.kernels.sm90.core.hardware import MULTIPROCESSORS
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm.launch import launch
from bipolar_jax.kernels.sm90.gemm.outputs.sign_packing import COUNT_BITS, DTYPES
from bipolar_jax.kernels.sm90.gemm.outputs.signs import SignOutput
from bipolar_jax.kernels.sm90.gemm.problem import Problem
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling
from bipolar_jax.kernels.sm90.quantize_rows.launch import PackedTokens
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.quantize.calibration import absmax_scale

_COUNT = (1 << COUNT_BITS) - 1


def feed_forward(
    x: Float[Array, "m columns"],
    up: Layer,
    down: Layer,
    prologue: Prologue | None,
    activation: Activation | None,
    residual: Float[Array, "m out"],
) -> Float[Array, "m out"]:
    """residual + down(activation(up(prologue(x)))) of prompts, where `down` takes one bit; all in x's dtype.

    The numbers are those of two calls of `operations.quantized_matmul`. Tokens whose scale is 0 or not finite may
    differ; their results are NaN, Inf or zeros (and a bias) either way.

    Raises:
      Unsupported: float32; more bits for `down`; few tokens; weights with groups; rows too long to quantize on
        chip.
    """
    up_choice, down_choice = _choose(x, up, down)
    operands = quantized_operands(x, up.w, up.a_format, up.bias, up_choice, prologue)
    signs = project_signs(*operands, up_choice.tiling, x.dtype, activation, interpret=interpret_params())
    return tokens_matmul(signs, down.w, down.a_format, down.bias, down_choice, x.dtype, residual)


def plan_feed_forward(
    x: Float[Array, "m columns"],
    up: Layer,
    down: Layer,
    prologue: Prologue | None,
    activation: Activation | None,
    residual: Float[Array, "m out"],
) -> Plan:
    """What `feed_forward` would run for these operands; raises as it would."""
    del prologue, activation, residual
    up_choice, down_choice = _choose(x, up, down)
    kernel = (
        f"{describe(up_choice, up.w, up.a_format)}, leaves one bit a number; "
        f"then {describe(down_choice, down.w, down.a_format)}"
    )
    return Plan(kernel, up_choice.reason, up_choice.tiling)


def _choose(x: Float[Array, "m columns"], up: Layer, down: Layer) -> tuple[Choice, Choice]:
    """The plans of both products. Raises as `feed_forward` does, except for rows too long to quantize."""
    m, dtype = x.shape[0], x.dtype
    if dtype.name not in DTYPES:
        raise Unsupported(f"signs are taken of bfloat16 or float16, not {dtype.name}")
    if down.a_format.bits != 1:
        raise Unsupported(f"signs are tokens of one bit, not {down.a_format.bits}")
    if down.a_format.span != 1:
        raise Unsupported(f"signs are tokens whose grid spans their whole range, not {down.a_format.span} of it")
    if is_expanded(up.w) or is_expanded(down.w):
        raise Unsupported("products of prepared weights, or of integer groups, neither leave signs nor take them")
    if shared_scale(up.w) is not None or shared_scale(down.w) is not None:
        raise Unsupported("products with groups of weights neither leave signs nor take them")
    if down.w.contracted_size > _COUNT:
        raise Unsupported(f"ones are counted up to {_COUNT}, not {down.w.contracted_size}")
    choice = choose_kernel(m, up.w, up.a_format)
    if isinstance(choice.tiling, DecodeTiling):
        raise Unsupported(f"{m} tokens are too few for tiles of them")
    return choice, choose_kernel(m, down.w, down.a_format)


def project_signs(
    x_words: UInt32[Array, "x_planes m x_words"],
    w_words: UInt32[Array, "w_planes n w_words"],
    tokens: TokenTerms,
    columns: ColumnTerms,
    recovery: Recovery,
    tiling: Tiling,
    dtype: jnp.dtype,
    activation: Activation | None,
    *,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> PackedTokens:
    """`quantize_and_pack` to one bit, as "planes", of the output of `packed_matmul`; see there for the arguments.

    A bit is one for a number from 0 on, for -0 and for NaN. The quantizer's bits are also ones where a negative number
    vanishes in units of the scale: below 2^-149 of it, and everywhere if the scale is 0, Inf or NaN. `code_sums` count
    the bits that are stored.

    Args:
      dtype: bfloat16 or float16, to which numbers are rounded before.
    """
    m, n = x_words.shape[1], w_words.shape[1] // (1 if activation is None else activation.parts)
    problem = Problem(m, n, recovery, tiling, blocks, activation=activation)
    words, tile_summaries = launch(
        problem, (x_words, w_words), tokens, columns, SignOutput(jnp.dtype(dtype)), interpret=interpret
    )
    # One reduction of whole summaries: a reduction of each of their fields would be a kernel of its own.
    summaries = lax.reduce(tile_summaries, jnp.uint32(0), _joined_summary, (0,))
    largest, code_sums = summaries >> COUNT_BITS, (summaries & _COUNT).astype(jnp.int32)
    scale = absmax_scale(lax.bitcast_convert_type(largest.astype(jnp.uint16), dtype)[:, None], BipolarFormat(1))
    # Tokens of one bit have zeros for zero codes already.
    zero_code = tokens.zero_code if recovery.a_format.bits == 1 else jnp.zeros_like(code_sums)
    return PackedTokens(words, scale, zero_code, code_sums)


def _joined_summary(a: UInt32[Array, "*rows"], b: UInt32[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    return (jnp.maximum(a >> COUNT_BITS, b >> COUNT_BITS) << COUNT_BITS) | ((a & _COUNT) + (b & _COUNT))
