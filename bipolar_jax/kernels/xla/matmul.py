"""Products on any device: bit planes are unpacked to int8 numbers, which XLA multiplies.

Signed codes of every precision fit int8, and so do the values of integer groups; `blocks` multiplies them exactly.
A scan over the groups that have a float scale of their own makes one product each, so that no [m, n, groups] array is
in memory. Float activations take one product for all groups where that is faster.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.activations import QuantizedTokens, quantize_tokens
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.kernels.xla.blocks import NT, by_rows, has_many_rows, on_cpu, signed_groups, signed_product
from bipolar_jax.packing import BipolarNumbers, PreparedArray, UnpackedArray
from bipolar_jax.quantize.groups import group_lengths, split_groups


def integer_matmul(codes: UInt8[Array, "m k"], w: BipolarNumbers, a_format: BipolarFormat) -> Int[Array, "m n groups"]:
    """See `Backend.integer_matmul`."""
    w = w.with_scales()
    w_signed = signed_groups(w)
    _, products = jax.lax.scan(
        lambda carry, group: (carry, _group_product(group, w_signed, w, a_format)),
        None,
        _groups(codes, w, a_format),
    )
    return jnp.moveaxis(products, 0, -1)


def quantized_matmul(
    x: Float[Array, "m columns"],
    w: BipolarNumbers,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None = None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.quantized_matmul`."""
    rows, row_factor = epilogue.reduced_rows(x.astype(jnp.float32) if prologue is None else prologue(x))
    tokens = quantize_tokens(rows, a_format)
    return tokens_matmul(tokens, w, a_format, bias, x.dtype, residual, activation, row_factor)


def tokens_matmul(
    tokens: QuantizedTokens,
    w: BipolarNumbers,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
    row_factor: Float[Array, " m"] | None = None,
) -> Float[Array, "m out"]:
    """The product of quantized activations; the arguments are those of `quantized_matmul` and of `epilogue.finish`."""
    w = w.with_scales()
    exponents = epilogue.column_exponents(w.scale, w.offset)
    w_signed = signed_groups(w)

    def add_group(total, group_and_scales):
        group, scale, offset = group_and_scales
        _, _, w_sums, length = group
        integers = _group_product(group, w_signed, w, a_format)
        total += epilogue.scale_group(integers, tokens.zero_value, w_sums, scale)
        if offset is not None:
            x_sums = epilogue.value_sums(_x_code_sums(group, a_format), a_format, length)
            total += epilogue.offset_group(x_sums, tokens.zero_value, length, offset)
        return total, None

    total = _zeros(w.row_sums, tokens.codes.shape[0])
    scales = _scales_and_offsets(w, exponents)
    total, _ = jax.lax.scan(add_group, total, (_groups(tokens.codes, w, a_format), *scales))
    return epilogue.finish(total, tokens.scale, bias, dtype, residual, activation, exponents, row_factor)


def weight_only_matmul(
    x: Float[Array, "m k"],
    w: BipolarNumbers,
    bias: Float[Array, " n"] | None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.weight_only_matmul`.

    The dot multiplies x by the integer values of the weights, which bfloat16 and float16 represent exactly (8
    significant bits), times a power of two that makes them less than 1, so that the dot overflows no sooner than the
    result. Float32 sums follow, then scales. No weight is rounded, with one exception: weights of several float scales
    and many rows are dequantized and rounded to x's dtype, one dot for all groups. Their errors are at most half a unit
    in the last place each, as those of a model in that dtype.
    """
    w = w.with_scales()
    factor, shift = w.signed_form
    shrink = 2.0 ** -(w.bits if w.groups is None else 7)
    dot = functools.partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    w_signed = signed_groups(w)
    rows, row_factor = epilogue.reduced_rows(x)
    x_groups = jnp.moveaxis(split_groups(rows, w.scale_group_size), -2, 0)
    exponents = epilogue.column_exponents(w.scale, w.offset)
    scales, offsets = _scales_and_offsets(w, exponents)

    def values_of(block):
        return factor * block.astype(jnp.float32) + shift

    def product(x_group, block):
        return dot(x_group, (values_of(block) * shrink).astype(x.dtype), NT)

    def add_group(total, group):
        index, x_group, scale, offset = group
        products = by_rows(w_signed, index, x.shape[0], functools.partial(product, x_group))
        total += products * (scale / shrink)[None]
        if offset is not None:
            total += jnp.sum(x_group, axis=-1, keepdims=True, dtype=jnp.float32) * offset[None]
        return total, None

    if len(x_groups) > 1 and has_many_rows(x.shape[0]):
        numbers = values_of(w_signed) * scales[..., None]
        numbers = numbers if offsets is None else numbers + offsets[..., None]
        joined_x, joined_w = (_joined(groups) for groups in (x_groups, numbers.astype(x.dtype)))
        total = dot(joined_x, joined_w, NT)
    elif len(x_groups) > 1 and not on_cpu():
        # [groups, m, n] in memory, of few rows.
        values = (values_of(w_signed) * shrink).astype(x.dtype)
        products = dot(x_groups, values, (((2,), (2,)), ((0,), (0,))))
        total = jnp.sum(products * (scales / shrink)[:, None], axis=0)
        if offsets is not None:
            x_sums = jnp.sum(x_groups, axis=-1, dtype=jnp.float32)
            total += jnp.sum(x_sums[..., None] * offsets[:, None], axis=0)
    else:
        total = _zeros(w.row_sums, x.shape[0])
        groups = (jnp.arange(len(x_groups), dtype=jnp.int32), x_groups, scales, offsets)
        total, _ = jax.lax.scan(add_group, total, groups)
    y = epilogue.finish(total, None, bias, x.dtype, column_exponent=exponents, row_factor=row_factor)
    return epilogue.activate_and_add(y, activation, x.dtype, residual)


def plan_matmul(m: int, dtype: jnp.dtype, w: BipolarNumbers, a_format: BipolarFormat | None) -> Plan:
    """See `Backend.plan_matmul`."""
    if a_format is None:
        dot = "float dot of integer values"
    else:
        dot = "float32 dot of signed codes" if on_cpu() else "int8 dot of signed codes"
    num_scales = w.num_groups if getattr(w, "float_terms", None) else w.scale.shape[-1]
    groups = "" if num_scales == 1 else f", one dot for each of {num_scales} groups"
    if isinstance(w, UnpackedArray):
        return Plan(f"XLA's {dot}{groups}", "runs on every device; the weights are unpacked, one byte each")
    if isinstance(w, PreparedArray):
        return Plan(f"XLA's {dot}{groups}", "runs on every device; undoes the layout of Hopper kernels each time")
    unpacks = "; unpacks the bit planes in every call, prepare_for_inference once" if on_cpu() else ""
    return Plan(f"XLA's {dot}{groups}", f"runs on every device{unpacks}")


def _scales_and_offsets(
    w: BipolarNumbers, exponents: Int[Array, " n"]
) -> tuple[Float[Array, "groups n"], Float[Array, "groups n"] | None]:
    """Scales and offsets of every group, divided by the columns' powers of two."""
    scale, offset = (None if a is None else epilogue.without_exponent(a, exponents).T for a in (w.scale, w.offset))
    return scale, offset


def _joined(groups: Float[Array, "groups rows size"]) -> Float[Array, "rows k"]:
    """Rows of all groups; K is filled up to whole groups."""
    return jnp.moveaxis(groups, 0, 1).reshape(groups.shape[1], -1)


def _zeros(row_sums: Int[Array, "n groups"], m: int) -> Float[Array, "m n"]:
    """Zeros [m, n] to sum into; computed from an operand, so that they vary over a shard_map's mesh as operands do."""
    return jnp.broadcast_to((0 * row_sums[:, 0]).astype(jnp.float32), (m, row_sums.shape[0]))


_Group = tuple[Int[Array, ""], Int8[Array, "m size"], Int[Array, " n"], Int[Array, ""]]
_Groups = tuple[Int[Array, " groups"], Int8[Array, "groups m size"], Int[Array, "groups n"], Int[Array, " groups"]]


def _groups(codes: UInt8[Array, "m k"], w: BipolarNumbers, a_format: BipolarFormat) -> _Groups:
    """Index, signed codes of x, sums of w's values and the true length, each with a leading group axis.

    A short last group is padded with the signed code 0, which adds nothing.
    """
    x_signed = jnp.moveaxis(split_groups(a_format.signed_codes(codes), w.scale_group_size), -2, 0)
    lengths = jnp.asarray(group_lengths(w.contracted_size, w.scale_group_size))
    return jnp.arange(len(lengths), dtype=jnp.int32), x_signed, w.value_sums().T, lengths


def _x_code_sums(group: _Group, a_format: BipolarFormat) -> Int[Array, " m"]:
    _, x_signed, _, length = group
    return jnp.sum(x_signed, axis=-1, dtype=jnp.int32) + a_format.code_offset * length


def _group_product(
    group: _Group, w_signed: Int8[Array, "groups n size"], w: BipolarNumbers, a_format: BipolarFormat
) -> Int[Array, "m n"]:
    """sum v_a v_w = 2 f sum c_a c_w + 2 r sum c_a + r_a sum v_w, with v_a = 2 c_a + r_a and v_w = f c_w + r."""
    index, x_signed, w_sums, _ = group
    largest_w = w.format.code_offset if w.groups is None else 128
    product = signed_product(x_signed, w_signed, index, (a_format.code_offset, largest_w))
    x_sums = jnp.sum(x_signed, axis=-1, dtype=jnp.int32)
    factor, shift = w.signed_form
    return 2 * factor * product + 2 * shift * x_sums[:, None] + a_format.value_shift * w_sums[None]
