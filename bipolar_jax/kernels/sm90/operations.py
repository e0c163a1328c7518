"""The three operations of a backend, on Hopper's tensor cores."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.sm90.epilogue import ColumnTerms, TokenTerms
from bipolar_jax.kernels.sm90.execution import interpret_params
from bipolar_jax.kernels.sm90.matmul import packed_matmul
from bipolar_jax.kernels.sm90.operand_words import code_words, weight_words
from bipolar_jax.kernels.sm90.plan import plan_product
from bipolar_jax.kernels.sm90.quantize import quantize_and_pack
from bipolar_jax.kernels.sm90.recovery import Recovery
from bipolar_jax.packing import BipolarArray

_NO_FLOAT = "float activations have no integer product: XLA's float dot serves them"


def integer_matmul(codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat) -> Int[Array, "m n groups"]:
    """See `Backend.integer_matmul`.

    Raises:
      NotImplementedError: w has groups.
    """
    _check_served(w)
    (m, k), n = codes.shape, w.planes.shape[-2]
    choice = plan_product(m, n, k, a_format, w.format)
    recovery = Recovery(choice.kind, a_format, w.format, k, with_zero=False)
    code_sums = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    product = packed_matmul(
        code_words(codes, a_format, choice.kind),
        weight_words(w, choice.kind),
        TokenTerms(code_sums, jnp.zeros_like(code_sums), None),
        ColumnTerms(w.row_sums[:, 0], None, None, None),
        recovery,
        choice.tiling,
        jnp.int32,
        interpret=interpret_params(),
    )
    return product[..., None]


def quantized_matmul(
    x: Float[Array, "m k"], w: BipolarArray, a_format: BipolarFormat, bias: Float[Array, " n"] | None
) -> Float[Array, "m n"]:
    """See `Backend.quantized_matmul`.

    Raises:
      NotImplementedError: w has groups.
    """
    _check_served(w)
    (m, k), n = x.shape, w.planes.shape[-2]
    choice = plan_product(m, n, k, a_format, w.format)
    recovery = Recovery(choice.kind, a_format, w.format, k, with_zero=a_format.bits > 1)
    tokens = quantize_and_pack(x, a_format, choice.kind, interpret=interpret_params())
    return packed_matmul(
        tokens.words,
        weight_words(w, choice.kind),
        TokenTerms(tokens.code_sums, tokens.zero_code, tokens.scale),
        ColumnTerms(
            w.row_sums[:, 0],
            w.scale[:, 0],
            None if w.offset is None else w.offset[:, 0],
            None if bias is None else bias.astype(jnp.float32),
        ),
        recovery,
        choice.tiling,
        x.dtype,
        interpret=interpret_params(),
    )


def weight_only_matmul(x: Float[Array, "m k"], w: BipolarArray, bias: Float[Array, " n"] | None) -> Float[Array, "m n"]:
    """Not here: XLA multiplies float activations as fast as the chip can.

    Raises:
      NotImplementedError: always.
    """
    raise NotImplementedError(_NO_FLOAT)


def plan(m: int, w: BipolarArray, a_format: BipolarFormat | None) -> Plan:
    """See `Backend.plan`."""
    if a_format is None:
        raise NotImplementedError(_NO_FLOAT)
    _check_served(w)
    choice = plan_product(m, w.planes.shape[-2], w.contracted_size, a_format, w.format)
    if choice.kind == "planes":
        kernel = f"binary tensor cores, {a_format.bits} x {w.bits} planes"
    else:
        kernel = f"int8 tensor cores, weights expanded from {w.bits} planes"
    return Plan(kernel, choice.reason, choice.tiling)


def _check_served(w: BipolarArray) -> None:
    if w.num_groups > 1:
        raise NotImplementedError(f"groups of {w.group_size} are not served yet: only one scale a column")
