"""From integer products to the output: the arithmetic after the mainloop of every backend.

Activations are s_x (v_x - v0), with a scale s_x and a zero v0 for each token m. Weights are s_w v_w + o_w, with a scale
and an offset for each column n and each group g of K. With L the true length of a group,

    y[m, n] = s_x[m] * sum_g (s_w[n, g] * (I[m, n, g] - v0[m] * V_w[n, g])
                              + o_w[n, g] * (V_x[m, g] - v0[m] * L[g])) + bias[n],

where I is the integer product of the values, and V_w and V_x are sums of values over the group. The activation, the
cast and the residual follow (`finish`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.quantize.groups import along_last


def value_sums(
    code_sums: Int[Array, "*rows"], number_format: BipolarFormat, length: int | Int[Array, "..."]
) -> Int[Array, "*rows"]:
    """Sums of values from sums of codes over groups of `length` elements, by v = 2 u - W."""
    values = number_format.max_value * jnp.asarray(length, jnp.int32)
    return 2 * code_sums - (along_last(values, code_sums.ndim) if values.ndim else values)


def scale_group(
    integers: Int[Array, "m n"],
    zero_value: Int[Array, " m"],
    w_value_sums: Int[Array, " n"],
    scale: Float[Array, " n"],
) -> Float[Array, "m n"]:
    """The term s_w * (I - v0 V_w) of one group, float32."""
    return _rounded(_difference(integers, zero_value[:, None] * w_value_sums[None]) * scale[None])


def offset_group(
    x_value_sums: Int[Array, " m"],
    zero_value: Int[Array, " m"],
    length: int | Int[Array, ""],
    offset: Float[Array, " n"],
) -> Float[Array, "m n"]:
    """The term o_w * (V_x - v0 L) of one group, float32."""
    return _rounded(_difference(x_value_sums, zero_value * length)[:, None] * offset[None])


def _rounded(product: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """The product, which XLA may not contract with a sum that follows: whether it did would depend on the program.

    The maximum changes no finite number; a barrier would write the product to memory.
    """
    return jnp.maximum(product, jnp.finfo(jnp.float32).min)


def _difference(a: Int[Array, "*shape"], b: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """a - b for int32 operands, in float32, as exact as float32 allows.

    The difference may exceed int32, and rounding a and b to float32 first would cancel their leading digits. So halves
    are subtracted as integers, which cannot overflow, and the lowest bits separately.
    """
    halves = (a >> 1) - (b >> 1)
    odd = (a & 1) - (b & 1)
    return 2.0 * halves.astype(jnp.float32) + odd.astype(jnp.float32)


def column_exponents(scale: Float[Array, "*n groups"], offset: Float[Array, "*n groups"] | None) -> Int[Array, "*n"]:
    """The exponent of each column's largest scale or offset, int32.

    Sums of terms whose scales and offsets are divided by these powers of two neither overflow nor lose bits.
    """
    largest = jnp.max(jnp.abs(scale), axis=-1)
    return _exponent(largest if offset is None else jnp.maximum(largest, jnp.max(jnp.abs(offset), axis=-1)))


def without_exponent(scale: Float[Array, "n groups"], exponents: Int[Array, " n"]) -> Float[Array, "n groups"]:
    """Scales, or offsets, divided by powers of two."""
    return scale * power_of_two(-exponents)[:, None]


def power_of_two(exponent: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^exponent for exponents from -126 to 127, float32."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _exponent(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """floor(log2(x)) of numbers that are not negative, limited to -126 ... 126, int32."""
    return jnp.clip((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127, -126, 126)


def reduced_rows(x: Float[Array, "m k"]) -> tuple[Float[Array, "m k"], Float[Array, " m"] | None]:
    """Rows that come near the largest float, divided by 2^32: their scales and their sums stay finite.

    Returns:
      x; the factor of every row that undoes it, float32, or None for float16, whose sums cannot overflow.
    """
    if x.dtype == jnp.float16:
        return x, None
    factor = row_factors(jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32))
    return jnp.where(factor[:, None] > 1, x * 2.0**-32, x), factor


def row_factors(largest: Float[Array, " m"]) -> Float[Array, " m"]:
    """What rows with these largest magnitudes are divided by: 2^32, or 1."""
    return jnp.where(largest > 2.0**96, jnp.float32(2.0**32), jnp.float32(1))


def finish(
    total: Float[Array, "m n"],
    token_scale: Float[Array, " m"] | None,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    residual: Float[Array, "m out"] | None = None,
    activation: Activation | None = None,
    column_exponent: Int[Array, " n"] | None = None,
    row_factor: Float[Array, " m"] | None = None,
) -> Float[Array, "m out"]:
    """Token scale, bias, activation, cast to `dtype`, and the residual, in this order.

    Args:
      total: float32; the sum over groups.
      token_scale: s_x; None where activations are floats.
      bias: added in float32.
      dtype: of the output and of the residual.
      residual: added after the cast.
      activation: applied in float32; a gated one makes n / 2 columns.
      column_exponent: what the scales were divided by, as exponents of two; None if they were not.
      row_factor: what the rows of x were divided by; None if they were not.
    """
    y = _scaled(total, token_scale, column_exponent)
    y = y if row_factor is None else y * row_factor[:, None]
    y = y if bias is None else y + bias.astype(jnp.float32)[None]
    return activate_and_add(y, activation, dtype, residual)


def _scaled(
    total: Float[Array, "m n"], token_scale: Float[Array, " m"] | None, column_exponent: Int[Array, " n"] | None
) -> Float[Array, "m n"]:
    """total * token_scale * 2^column_exponent, which overflows and underflows only if the result does."""
    if column_exponent is None:
        return total if token_scale is None else total * token_scale[:, None]
    exponent = column_exponent[None]
    if token_scale is not None:
        token_exponent = _exponent(token_scale)
        total = total * (token_scale * power_of_two(-token_exponent))[:, None]
        exponent = exponent + token_exponent[:, None]
    half = exponent >> 1
    return total * power_of_two(half) * power_of_two(exponent - half)


def activate_and_add(
    y: Float[Array, "m n"], activation: Activation | None, dtype: jnp.dtype, residual: Float[Array, "m out"] | None
) -> Float[Array, "m out"]:
    """Activation in float32, cast to `dtype`, residual in `dtype`: the last three steps of `finish`."""
    y = (y if activation is None else activation(y)).astype(dtype)
    return y if residual is None else residual + y
