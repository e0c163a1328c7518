"""Products whose contracted axis or tokens are cut over devices, within `jax.shard_map`: exact sums, then the scales.

Each device has a part of every token and of every column. Tokens are quantized by the extremes of whole rows, which one
reduction of two numbers a token finds. Products of parts are int32 sums; one reduction adds them (and, where columns
have offsets, a sum for each token), before anything is rounded. So the result has the bits of one device's. With float
scales of groups each device scales its own groups, and float32 numbers are added.

Tokens may be cut over the same devices (sequence parallelism, arXiv 2205.05198): sums are then reduce-scattered over
tokens, so that each device scales its own tokens; and a product whose k is whole takes each device's tokens, quantizes
them there, and gathers the codes, which are fewer bytes than the numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels import xla
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.activations import QuantizedTokens, quantize_tokens, tokens_between
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops.dispatch import dispatch
from bipolar_jax.packing import BipolarNumbers
from bipolar_jax.packing.cuts import check_contracted_cut, part_for_sum
from bipolar_jax.packing.words import pack_codes, unpack_codes
from bipolar_jax.quantize.calibration import row_extremes


@dataclasses.dataclass(frozen=True)
class PartsOfK:
    """The static operands of such a product.

    Attributes:
      axes: mesh axes that k is cut over, or tokens are, or both.
      a_format, activation, implementation: as of `matmul`.
      dtype: of the result, by name.
      cuts_k: whether k is cut: x has a part of every row.
      cuts_tokens: whether tokens are: those of the result if k is cut too, else those of x.
    """

    axes: tuple[str, ...]
    a_format: BipolarFormat | None
    activation: Activation | None
    implementation: str
    dtype: str
    cuts_k: bool = True
    cuts_tokens: bool = False


class _Part(NamedTuple):
    """A device's part of the weights.

    Attributes:
      w: the part, as its products take it.
      k: elements of k on all devices.
      is_exact: whether int32 sums are added, all devices having the same scales of columns; else each device scales its
        groups, of which it may have one alone.
      value_sums: sums of the values of whole columns, of weights with one scale a column; None if only those of the
        part are at hand.
    """

    w: BipolarNumbers
    k: int
    is_exact: bool
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
        is_exact = w.has_integer_groups or w.group_size is None or (parts == 1 and w.num_groups == 1)
        return _Part(w, parts * k_of_part, is_exact, None)
    if w.contracted_size != parts * k_of_part:
        raise ValueError(
            f"{w} is cut over {parts} devices ({', '.join(axes)}), and a token of {k_of_part} numbers fits neither "
            f"k={w.contracted_size} nor a part of it"
        )
    check_contracted_cut(w, parts)
    is_exact = w.has_integer_groups or w.num_groups == 1
    sums = w.value_sums()[:, 0] if is_exact else None
    return _Part(part_for_sum(w, parts, jax.lax.axis_index(axes) == 0), w.contracted_size, is_exact, sums)


def sum_of_parts(
    static: PartsOfK,
    x: Float[Array, "m columns"],
    residual: Float[Array, "own out"] | None,
    part: _Part,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None,
) -> Float[Array, "own out"]:
    """prologue(x) @ w of all parts; without a gradient.

    Args:
      static: see `PartsOfK`.
      x: this device's numbers of every token; of a gated activation its gates, then its values.
      residual: of the result, not cut but where its tokens are.
      part: see `part_of`.
      bias: of all columns, added once.
      prologue: an `Activation` without rotation, or None.

    Returns:
      All tokens, the same on every device of `static.axes`; or, if tokens are cut, this device's.
    """
    dtype = jnp.dtype(static.dtype)
    if static.a_format is None:
        x = x if prologue is None else prologue(x).astype(x.dtype)
        total = _reduced(static, _weight_only(static, x, part.w).astype(jnp.float32))
        total = total if bias is None else total + bias.astype(jnp.float32)[None]
        return epilogue.activate_and_add(total.astype(dtype), static.activation, dtype, residual)
    rows = x.astype(jnp.float32) if prologue is None else prologue(x)
    tokens, row_factor = _quantized(rows, static.a_format, static.axes)
    if static.cuts_tokens:
        own_scale, own_zero, row_factor = _own_rows(static.axes, tokens.scale, tokens.zero_value, row_factor)
    else:
        own_scale, own_zero = tokens.scale, tokens.zero_value
    if part.is_exact:
        total, exponents = _exact_sums(static, tokens, own_zero, part)
    else:
        total, exponents, own_scale = _reduced(static, _scaled_sums(static, tokens, part.w)), None, None
    return epilogue.finish(total, own_scale, bias, dtype, residual, static.activation, exponents, row_factor)


def product_of_gathered(
    static: PartsOfK,
    x: Float[Array, "own columns"],
    residual: Float[Array, "m out"] | None,
    w: BipolarNumbers,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None,
) -> Float[Array, "m out"]:
    """prologue(x) @ w of all devices' tokens, quantized where they are; without a gradient.

    A token crosses the links in its bits a number, and three numbers more; float activations in x's dtype.

    Args:
      static: see `PartsOfK`.
      x: this device's tokens.
      residual, bias: as of `matmul`, of all tokens.
      w: whole along k.
      prologue: any.
    """
    dtype = jnp.dtype(static.dtype)
    gather = functools.partial(jax.lax.all_gather, axis_name=static.axes, axis=0, tiled=True)
    if static.a_format is None:
        rows = gather(x if prologue is None else prologue(x).astype(x.dtype))
        return dispatch(
            static.implementation,
            lambda backend: backend.weight_only_matmul(rows, w, bias, residual, static.activation),
        )
    rows, row_factor = epilogue.reduced_rows(x.astype(jnp.float32) if prologue is None else prologue(x))
    own = quantize_tokens(rows, static.a_format)
    bits = [jax.lax.bitcast_convert_type(each, jnp.int32) for each in (own.scale, own.zero_value, row_factor)]
    scale, zero_value, row_factor = gather(jnp.stack(bits, axis=-1)).T
    scale, row_factor = (jax.lax.bitcast_convert_type(each, jnp.float32) for each in (scale, row_factor))
    tokens = QuantizedTokens(_gathered_codes(own.codes, static), scale, zero_value)
    if not (w.has_integer_groups or w.num_groups == 1):
        _check_float_groups(static)
        operands = (tokens, w, static.a_format, bias, dtype, residual, static.activation, row_factor)
        return xla.tokens_matmul(*operands)
    part = _Part(w, w.contracted_size, True, w.value_sums()[:, 0])
    total, exponents = _exact_sums(static, tokens, zero_value, part)
    return epilogue.finish(total, scale, bias, dtype, residual, static.activation, exponents, row_factor)


def _gathered_codes(codes: UInt8[Array, "own k"], static: PartsOfK) -> UInt8[Array, "m k"]:
    """All devices' codes, which travel as bytes or, of fewer than 8 bits, as planes."""
    gather = functools.partial(jax.lax.all_gather, axis_name=static.axes, tiled=True)
    if static.a_format.bits == 8:
        return gather(codes, axis=0)
    planes = gather(pack_codes(codes, static.a_format), axis=1)
    return unpack_codes(planes, static.a_format, codes.shape[-1])


def _reduced(static: PartsOfK, sums: Array) -> Array:
    """Sums of all devices; of this device's tokens alone, the first axis, if tokens are cut."""
    if not static.cuts_k:
        return sums
    if static.cuts_tokens:
        return jax.lax.psum_scatter(sums, static.axes, scatter_dimension=0, tiled=True)
    return jax.lax.psum(sums, static.axes)


def _own_rows(axes: tuple[str, ...], *arrays: Array) -> list[Array]:
    """This device's part of the first axis of arrays."""
    size = arrays[0].shape[0] // jax.lax.axis_size(axes)
    start = jax.lax.axis_index(axes) * size
    return [jax.lax.dynamic_slice_in_dim(array, start, size) for array in arrays]


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


def _exact_sums(
    static: PartsOfK, tokens: QuantizedTokens, own_zero: Int[Array, " own"], part: _Part
) -> tuple[Float[Array, "own n"], Int[Array, " n"]]:
    """Products with the columns' scales and offsets, from int32 sums of all parts; and what they were divided by."""
    w, a_format = part.w, static.a_format
    products = dispatch(static.implementation, lambda backend: backend.integer_matmul(tokens.codes, w, a_format))
    sums = {"products": products[..., 0]}
    if w.offset is not None:
        code_sums = jnp.sum(tokens.codes, axis=-1, dtype=jnp.int32)
        sums["tokens"] = epilogue.value_sums(code_sums, a_format, tokens.codes.shape[-1])
    column_sums = {} if part.value_sums is not None else {"columns": w.value_sums()[:, 0]}
    if static.cuts_tokens or not static.cuts_k:
        sums = {name: _reduced(static, each) for name, each in sums.items()}
        column_sums = jax.lax.psum(column_sums, static.axes)
    else:  # one reduction of all
        sums = jax.lax.psum(sums | column_sums, static.axes)
        column_sums = sums
    value_sums = part.value_sums if part.value_sums is not None else column_sums["columns"]
    exponents = epilogue.column_exponents(w.scale, w.offset)
    scale = epilogue.without_exponent(w.scale, exponents)[:, 0]
    total = epilogue.scale_group(sums["products"], own_zero, value_sums, scale)
    if w.offset is not None:
        offset = epilogue.without_exponent(w.offset, exponents)[:, 0]
        total += epilogue.offset_group(sums["tokens"], own_zero, part.k, offset)
    return total, exponents


def _scaled_sums(static: PartsOfK, tokens: QuantizedTokens, w: BipolarNumbers) -> Float[Array, "m n"]:
    """Products of groups with float scales, each device's scaled and added in float32."""
    _check_float_groups(static)
    return xla.tokens_matmul(tokens, w, static.a_format, None, jnp.dtype(jnp.float32))


def _check_float_groups(static: PartsOfK) -> None:
    """Raises Unsupported for a backend that multiplies groups with float scales only as it quantizes tokens."""
    if static.implementation not in ("auto", "xla"):
        raise Unsupported(
            f"{static.implementation} gives no sums of groups with float scales where k or tokens are cut: use "
            'implementation="auto", or integer groups (`to_integer_groups`)'
        )


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
    """`sum_of_parts` or `product_of_gathered` of rows [*batch, columns]; cut tokens are the last of the batch axes."""
    k = x.shape[-1] // (1 if prologue is None else prologue.parts)
    if static.cuts_tokens:  # tokens lead, so that those of a device are neighbours in all sequences
        x, residual = (None if each is None else jnp.moveaxis(each, -2, 0) for each in (x, residual))
    rows = x.reshape(-1, x.shape[-1])
    residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
    with jax.named_scope("bipolar_matmul_of_parts"):
        if static.cuts_k:
            product = sum_of_parts(static, rows, residual, part_of(w, k, static.axes), bias, prologue)
        else:
            product = product_of_gathered(static, rows, residual, w, bias, prologue)
    if static.cuts_tokens:
        return jnp.moveaxis(product.reshape(-1, *x.shape[1:-1], product.shape[-1]), 0, -2)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _forward(static, *operands):
    cut = " and ".join(name for name, is_cut in (("k", static.cuts_k), ("tokens", static.cuts_tokens)) if is_cut)
    raise Unsupported(
        f"the product of {cut} cut over {', '.join(static.axes)} has no gradient: differentiate one whose n is cut, or "
        "which is not cut"
    )


def _backward(static, residuals, cotangent):
    raise NotImplementedError("never reached: `_forward` raises")


parts_product.defvjp(_forward, _backward)
