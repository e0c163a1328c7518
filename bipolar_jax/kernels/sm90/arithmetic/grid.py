"""The grid that spans a vector's numbers, from their extremes: `quantize.calibration.spanning_grid` on the device.

Numbers are scale * 2 (code - zero_code), with codes from 0 to `BipolarFormat.max_value`. The grid of one bit has no
zero: numbers are scale * (2 code - 1). That of a `symmetric` format has zero at a constant code. Of a format with a
`span` the grid spans that part of the numbers' range, and numbers beyond it take its ends. The arithmetic is that of
XLA where it compiles `spanning_grid`: a constant divisor is a factor, and a product that is added to is not rounded.

Two forms: of arrays that every thread holds (decode attention, the decode step), and of values of `core.ptx`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.sm90.core import ptx
from bipolar_jax.kernels.sm90.core.ptx import Value
from bipolar_jax.quantize.calibration import LARGEST_SCALE, SMALLEST_SCALE, flush_scale, half_steps_per_unit


def spanning_scale(
    high: Float[Array, ""], low: Float[Array, ""], number_format: BipolarFormat, factor: Float[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The scale, and 1 / (2 scale), for factor times numbers that reach from low to high.

    Args:
      high, low: extremes of the numbers and 0.
      number_format: 1 to 8 bits.
      factor: of all numbers, positive. The second result includes it: it multiplies numbers that do not.
    """
    top = number_format.max_value
    symmetric = top == 1 or number_format.symmetric
    scale = jnp.maximum(high, -low) if symmetric else high * 0.5 - low * 0.5
    if number_format.span != top:
        scale = scale * (number_format.span / top)
    scale = flush_scale(scale if factor is None else scale * factor)
    half_steps = half_steps_per_unit(scale)
    return scale, half_steps if factor is None else half_steps * factor


def zero_code_of(low: Float[Array, ""], half_steps: Float[Array, ""], number_format: BipolarFormat) -> Int[Array, ""]:
    """The code of 0, of 2 to 8 bits; `low` as in `spanning_scale`."""
    if number_format.symmetric:
        return jnp.int32(number_format.code_offset)
    if number_format.span != 1:
        low = low * number_format.span
    # Not negative, so that truncation rounds down.
    return jnp.minimum(jnp.maximum(0.5 - low * half_steps, 0.0), float(number_format.max_value)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class RowGrid:
    """The grid of a row, as values.

    Attributes:
      scale: float32.
      half_steps: 1 / (2 scale), times the row's factor: it multiplies the row's numbers.
      zero: the code of zero as a float; None for one bit.
    """

    scale: Value
    half_steps: Value
    zero: Value | None


def row_grid(number_format: BipolarFormat, high: Value, minus_low: Value, factor: Value | None) -> RowGrid:
    """`spanning_scale` and `zero_code_of` of values, for numbers from -minus_low to high."""
    nothing, top, span = ptx.float32(0), number_format.max_value, number_format.span
    if top == 1 or number_format.symmetric:
        scale = ptx.as_float(ptx.extreme("max", "f32", ptx.as_word(high), ptx.as_word(minus_low)))
    else:
        half = ptx.float32(0.5)
        scale = ptx.add(ptx.multiply(high, half), ptx.multiply(minus_low, half))
    if span != top:
        scale = ptx.multiply(scale, ptx.float32(span / top))
    if factor is not None:
        scale = ptx.multiply(scale, factor)
    scale = ptx.choose(ptx.is_greater(scale, LARGEST_SCALE), ptx.float32(float("inf")), scale)
    vanishes = ptx.is_less(scale, SMALLEST_SCALE)
    scale = ptx.choose(vanishes, nothing, scale)
    half_steps = ptx.divide(ptx.float32(0.5), ptx.choose(vanishes, ptx.float32(1), scale))
    half_steps = ptx.choose(vanishes, nothing, half_steps)
    if factor is not None:
        half_steps = ptx.multiply(half_steps, factor)
    if top == 1:
        return RowGrid(scale, half_steps, None)
    if number_format.symmetric:
        return RowGrid(scale, half_steps, ptx.float32(number_format.code_offset))
    if span != 1:
        minus_low = ptx.multiply(minus_low, ptx.float32(span))
    zero = ptx.floor(ptx.fma(minus_low, half_steps, ptx.float32(0.5)))
    return RowGrid(scale, half_steps, ptx.at_most(ptx.at_least(zero, 0.0), float(top)))
