"""Products on any device: bit planes are unpacked to signed codes, which XLA's int8 dot multiplies.

Signed codes of every precision fit int8, and an int8 dot with int32 accumulation is exact on every platform if K is a
multiple of 4. A scan over groups makes one dot each, so that no [m, n, groups] array is in memory.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.backend import Plan
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.kernels.semantics.prologue import Activation, Prologue
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.groups import group_lengths, split_groups

_NT = (((1,), (1,)), ((), ()))  # dimension numbers: both operands have the contracted axis last

# On GPUs the int8 dot of jaxlib 0.11.2 is wrong for other K.
_K_ALIGNMENT = 4


def integer_matmul(codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat) -> Int[Array, "m n groups"]:
    """See `Backend.integer_matmul`."""
    _, products = jax.lax.scan(
        lambda carry, group: (carry, _group_product(group, w.format, a_format)), None, _groups(codes, w, a_format)
    )
    return jnp.moveaxis(products, 0, -1)


def quantized_matmul(
    x: Float[Array, "m columns"],
    w: BipolarArray,
    a_format: BipolarFormat,
    bias: Float[Array, " n"] | None,
    prologue: Prologue | None = None,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
) -> Float[Array, "m out"]:
    """See `Backend.quantized_matmul`."""
    rows, row_factor = epilogue.reduced_rows(x.astype(jnp.float32) if prologue is None else prologue(x))
    tokens = quantize_tokens(rows, a_format)
    exponents = epilogue.column_exponents(w.scale, w.offset)

    def add_group(total, group_and_scales):
        group, scale, offset = group_and_scales
        _, _, w_code_sums, length = group
        integers = _group_product(group, w.format, a_format)
        w_sums = epilogue.value_sums(w_code_sums, w.format, length)
        total += epilogue.scale_group(integers, tokens.zero_value, w_sums, scale)
        if offset is not None:
            x_sums = epilogue.value_sums(_x_code_sums(group, a_format), a_format, length)
            total += epilogue.offset_group(x_sums, tokens.zero_value, length, offset)
        return total, None

    total = _zeros(w.row_sums, x.shape[0])
    scales = _scales_and_offsets(w, exponents)
    total, _ = jax.lax.scan(add_group, total, (_groups(tokens.codes, w, a_format), *scales))
    return epilogue.finish(total, tokens.scale, bias, x.dtype, residual, activation, exponents, row_factor)


def weight_only_matmul(x: Float[Array, "m k"], w: BipolarArray, bias: Float[Array, " n"] | None) -> Float[Array, "m n"]:
    """See `Backend.weight_only_matmul`.

    The dot multiplies x by the integer values of the weights, which bfloat16 and float16 represent exactly (8
    significant bits), times a power of two that makes them less than 1, so that the dot overflows no sooner than the
    result. Scales follow. No weight is rounded.
    """
    shrink = 2.0**-w.bits
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    values = (dataclasses.replace(w, axis=-1).values().astype(jnp.float32) * shrink).astype(x.dtype)

    def add_group(total, group):
        x_group, w_group, scale, offset = group
        product = jax.lax.dot_general(x_group, w_group, _NT, precision=precision, preferred_element_type=jnp.float32)
        total += product * (scale / shrink)[None]
        if offset is not None:
            total += jnp.sum(x_group, axis=-1, keepdims=True, dtype=jnp.float32) * offset[None]
        return total, None

    rows, row_factor = epilogue.reduced_rows(x)
    x_groups, w_groups = (jnp.moveaxis(split_groups(a, w.group_size), -2, 0) for a in (rows, values))
    exponents = epilogue.column_exponents(w.scale, w.offset)
    total = _zeros(w.row_sums, x.shape[0])
    total, _ = jax.lax.scan(add_group, total, (x_groups, w_groups, *_scales_and_offsets(w, exponents)))
    return epilogue.finish(total, None, bias, x.dtype, column_exponent=exponents, row_factor=row_factor)


def plan_matmul(m: int, dtype: jnp.dtype, w: BipolarArray, a_format: BipolarFormat | None) -> Plan:
    """See `Backend.plan_matmul`."""
    dot = "float dot of integer values" if a_format is None else "int8 dot of signed codes"
    groups = "" if w.num_groups == 1 else f", one dot for each of {w.num_groups} groups"
    return Plan(f"XLA's {dot}{groups}", "runs on every device")


def _scales_and_offsets(
    w: BipolarArray, exponents: Int[Array, " n"]
) -> tuple[Float[Array, "groups n"], Float[Array, "groups n"] | None]:
    """Scales and offsets of every group, divided by the columns' powers of two."""
    scale, offset = (None if a is None else epilogue.without_exponent(a, exponents).T for a in (w.scale, w.offset))
    return scale, offset


def _zeros(row_sums: Int[Array, "n groups"], m: int) -> Float[Array, "m n"]:
    """Zeros [m, n] to sum into; computed from an operand, so that they vary over a shard_map's mesh as operands do."""
    return jnp.broadcast_to((0 * row_sums[:, 0]).astype(jnp.float32), (m, row_sums.shape[0]))


_Group = tuple[Int8[Array, "m size"], Int8[Array, "n size"], Int[Array, " n"], Int[Array, ""]]
_Groups = tuple[
    Int8[Array, "groups m size"], Int8[Array, "groups n size"], Int[Array, "groups n"], Int[Array, " groups"]
]


def _groups(codes: UInt8[Array, "m k"], w: BipolarArray, a_format: BipolarFormat) -> _Groups:
    """Signed codes of both operands, w's code sums and the true length, each with a leading group axis.

    A short last group is padded with the signed code 0, which adds nothing.
    """
    x_signed = _aligned_groups(a_format.signed_codes(codes), w.group_size)
    w_signed = _aligned_groups(w.format.signed_codes(w.codes()), w.group_size)
    return x_signed, w_signed, w.row_sums.T, jnp.asarray(group_lengths(w.contracted_size, w.group_size))


def _aligned_groups(signed: Int8[Array, "rows k"], group_size: int | None) -> Int8[Array, "groups rows size"]:
    """The group axis first, each group padded with zeros to a multiple of _K_ALIGNMENT."""
    groups = jnp.moveaxis(split_groups(signed, group_size), -2, 0)
    return jnp.pad(groups, ((0, 0), (0, 0), (0, -groups.shape[-1] % _K_ALIGNMENT)))


def _x_code_sums(group: _Group, a_format: BipolarFormat) -> Int[Array, " m"]:
    x_signed, _, _, length = group
    return jnp.sum(x_signed, axis=-1, dtype=jnp.int32) + a_format.code_offset * length


def _group_product(group: _Group, w_format: BipolarFormat, a_format: BipolarFormat) -> Int[Array, "m n"]:
    """sum v_a v_w = 4 sum c_a c_w + 2 r_w sum c_a + 2 r_a sum c_w + L r_a r_w, with v = 2 c + r."""
    x_signed, w_signed, w_code_sums, length = group
    product = jax.lax.dot_general(x_signed, w_signed, _NT, preferred_element_type=jnp.int32)
    x_sums = jnp.sum(x_signed, axis=-1, dtype=jnp.int32)
    w_sums = w_code_sums - w_format.code_offset * length
    r_a, r_w = a_format.value_shift, w_format.value_shift
    return 4 * product + 2 * r_w * x_sums[:, None] + 2 * r_a * w_sums[None] + length * (r_a * r_w)
