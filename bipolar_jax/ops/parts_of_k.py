"""Products whose contracted axis is cut over devices, within `jax.shard_map`: exact sums first, then the scales.

Each device has a part of every token and of every column. Tokens are quantized by the extremes of whole rows, which one
reduction of two numbers a token finds. Products of parts are int32 sums; one reduction adds them (and, where columns
have offsets, a sum for each token), before anything is rounded. So the result has the bits of one device's. With float
scales of groups each device scales its own groups, and float32 numbers are added.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels import xla
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.activations import QuantizedTokens, tokens_between
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops.dispatch import dispatch
from bipolar_jax.packing import BipolarNumbers
from bipolar_jax.packing.cuts import check_contracted_cut, part_for_sum
from bipolar_jax.quantize.calibration import row_extremes


@dataclasses.dataclass(frozen=True)
class PartsOfK:
    """The static operands of such a product.

    Attributes:
      axes: mesh axes that k is cut over.
      a_format, activation, implementation: as of `matmul`.
      dtype: of the result, by name.
    """

    axes: tuple[str, ...]
    a_format: BipolarFormat | None
    activation: Activation | None
    implementation: str
    dtype: str


class _Part(NamedTuple):
    """A device's part of the weights.

    Attributes:
      w: the part, as its products take it.
      k: elements of k on all devices.
      value_sums: sums of the values of whole columns, of weights with one scale a column; None if only those of the
        part are at hand.
    """

    w: BipolarNumbers
    k: int
    value_sums: Int[Array, " n"] | None


def part_of(w: BipolarNumbers, k_of_part: int, axes: tuple[str, ...]) -> _Part:
    """What this device multiplies.

    Args:
      w: an array whose leaves are cut as `packing.cuts.partition_specs` says, or a part that is an array in its own
        right, as `packing.cuts.own_part` and what is prepared of it.
      k_of_part: numbers of a token on this device.
      axes: mesh axes that k is cut over.

    Raises:
      ValueError: neither fits the tokens.
    """
    parts = jax.lax.axis_size(axes)
    if w.contracted_size == k_of_part:
        return _Part(w, parts * k_of_part, None)
    if w.contracted_size != parts * k_of_part:
        raise ValueError(
            f"{w} is cut over {parts} devices ({', '.join(axes)}), and a token of {k_of_part} numbers fits neither "
            f"k={w.contracted_size} nor a part of it"
        )
    check_contracted_cut(w, parts)
    sums = w.value_sums()[:, 0] if w.scale_group_size is None or w.num_groups == 1 else None
    return _Part(part_for_sum(w, parts, jax.lax.axis_index(axes) == 0), w.contracted_size, sums)


def sum_of_parts(
    static: PartsOfK,
    x: Float[Array, "m columns"],
    residual: Float[Array, "m out"] | None,
    part: _Part,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None,
) -> Float[Array, "m out"]:
    """prologue(x) @ w of all parts, the same on every device of `static.axes`; without a gradient.

    Args:
      static: see `PartsOfK`.
      x: this device's numbers of every token; of a gated activation its gates, then its values.
      residual: of the result, not cut.
      part: see `part_of`.
      bias: of all columns, added once.
      prologue: an `Activation` without rotation, or None.
    """
    dtype = jnp.dtype(static.dtype)
    if static.a_format is None:
        x = x if prologue is None else prologue(x).astype(x.dtype)
        total = jax.lax.psum(_weight_only(static, x, part.w).astype(jnp.float32), static.axes)
        total = total if bias is None else total + bias.astype(jnp.float32)[None]
        return epilogue.activate_and_add(total.astype(dtype), static.activation, dtype, residual)
    rows = x.astype(jnp.float32) if prologue is None else prologue(x)
    tokens, row_factor = _quantized(rows, static.a_format, static.axes)
    if part.w.has_integer_groups or part.w.num_groups == 1:
        total, exponents = _exact_sums(static, tokens, part)
        token_scale = tokens.scale
    else:
        total, exponents, token_scale = _scaled_sums(static, tokens, part.w), None, None
    return epilogue.finish(total, token_scale, bias, dtype, residual, static.activation, exponents, row_factor)


def _quantized(
    rows: Float[Array, "m k"], a_format: BipolarFormat, axes: tuple[str, ...]
) -> tuple[QuantizedTokens, Float[Array, " m"]]:
    """This device's part of the tokens that `quantize_tokens(epilogue.reduced_rows(...))` makes of whole rows.

    A row with NaN on any device has an infinite scale: collectives need not pass NaN on.
    """
    low, high = row_extremes(rows)
    has_nan = jnp.isnan(high)
    low, high = jnp.where(has_nan, 0.0, low), jnp.where(has_nan, jnp.inf, high)
    extremes = jax.lax.pmax(jnp.stack([-low, high], axis=-1), axes)
    low, high = -extremes[:, 0], extremes[:, 1]
    factor = epilogue.row_factors(jnp.maximum(-low, high))
    shrunk = 1 / factor  # a power of two, as the factor is
    tokens = tokens_between(rows * shrunk[:, None], low * shrunk, high * shrunk, a_format)
    return tokens, factor


def _exact_sums(static: PartsOfK, tokens: QuantizedTokens, part: _Part) -> tuple[Float[Array, "m n"], Int[Array, " n"]]:
    """Products with the columns' scales and offsets, from int32 sums of all parts; and what they were divided by."""
    w, a_format = part.w, static.a_format
    sums = {
        "products": dispatch(static.implementation, lambda backend: backend.integer_matmul(tokens.codes, w, a_format))[
            ..., 0
        ]
    }
    if w.offset is not None:
        code_sums = jnp.sum(tokens.codes, axis=-1, dtype=jnp.int32)
        sums["tokens"] = epilogue.value_sums(code_sums, a_format, tokens.codes.shape[-1])
    if part.value_sums is None:
        sums["columns"] = w.value_sums()[:, 0]
    sums = jax.lax.psum(sums, static.axes)
    column_sums = sums["columns"] if part.value_sums is None else part.value_sums
    exponents = epilogue.column_exponents(w.scale, w.offset)
    scale = epilogue.without_exponent(w.scale, exponents)[:, 0]
    total = epilogue.scale_group(sums["products"], tokens.zero_value, column_sums, scale)
    if w.offset is not None:
        offset = epilogue.without_exponent(w.offset, exponents)[:, 0]
        total += epilogue.offset_group(sums["tokens"], tokens.zero_value, part.k, offset)
    return total, exponents


def _scaled_sums(static: PartsOfK, tokens: QuantizedTokens, w: BipolarNumbers) -> Float[Array, "m n"]:
    """Products of groups with float scales, each device's scaled and added in float32, then added over devices."""
    if static.implementation not in ("auto", "xla"):
        raise Unsupported(
            f"{static.implementation} gives no sums of groups with float scales where k is cut: use "
            'implementation="auto", or integer groups (`to_integer_groups`)'
        )
    return jax.lax.psum(xla.tokens_matmul(tokens, w, static.a_format, None, jnp.dtype(jnp.float32)), static.axes)


def _weight_only(static: PartsOfK, x: Float[Array, "m k"], w: BipolarNumbers) -> Float[Array, "m n"]:
    return dispatch(static.implementation, lambda backend: backend.weight_only_matmul(x, w, None))


def check_prologue_of_parts(prologue: Prologue | None, axes: tuple[str, ...]) -> None:
    """Raises ValueError for a prologue that needs whole rows."""
    if prologue is None or (isinstance(prologue, Activation) and prologue.rotation is None):
        return
    kind = "rotation" if not hasattr(prologue, "eps") else type(prologue).__name__
    raise ValueError(
        f"a {kind} needs whole rows, and k is cut over {', '.join(axes)}: compute it before the rows are cut, or cut "
        "the columns of this product instead"
    )


# Without a gradient, because the transpose of a sum over devices depends on what the caller does with its result.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def parts_product(static: PartsOfK, x, residual, w, bias, prologue):
    """`sum_of_parts` of rows [*batch, columns]."""
    m, k = math.prod(x.shape[:-1]), x.shape[-1] // (1 if prologue is None else prologue.parts)
    rows = x.reshape(m, x.shape[-1])
    residual = None if residual is None else residual.reshape(m, residual.shape[-1])
    with jax.named_scope("bipolar_matmul_of_parts"):
        product = sum_of_parts(static, rows, residual, part_of(w, k, static.axes), bias, prologue)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _forward(static, *operands):
    raise Unsupported(
        f"the product of k cut over {', '.join(static.axes)} has no gradient: differentiate one whose n is cut, or "
        "which is not cut"
    )


def _backward(static, residuals, cotangent):
    raise NotImplementedError("never reached: `_forward` raises")


parts_product.defvjp(_forward, _backward)
