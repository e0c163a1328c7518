"""Scales and offsets of groups as integers, below one float scale for each row."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Integer, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.groups import along_last, group_lengths, spread_groups

Scales = Literal["float", "integer"]

# Wider codes would leave 1 or 2 as the only integer scales.
MOST_BITS = 6
SMALLEST_VALUE, LARGEST_VALUE = -128, 127
_INT32_MAX = 2**31 - 1


def default_scales(number_format: BipolarFormat, group_size: int | None) -> Scales:
    """The kind of scales where none is named: "integer" for groups of 1 to 6 bits, else "float"."""
    return "integer" if group_size is not None and number_format.bits <= MOST_BITS else "float"


def check_scales(scales: str, number_format: BipolarFormat, group_size: int | None) -> None:
    """Raises ValueError if `scales` is not a `Scales`, or not one for this format and group size."""
    if scales not in get_args(Scales):
        raise ValueError(f"scales must be one of {', '.join(get_args(Scales))}, got {scales!r}")
    if scales == "integer" and group_size is None:
        raise ValueError('scales "integer" are those of groups, got group_size None: give a group_size')
    if scales == "integer" and number_format.bits > MOST_BITS:
        raise ValueError(
            f'scales "integer" are for 1 to {MOST_BITS} bits, got {number_format.bits}: use "float", or fewer bits'
        )


def largest_scale(number_format: BipolarFormat) -> int:
    """The largest integer scale whose grid fits 8 bits: 255 // W, and 127 for ternary."""
    return (LARGEST_VALUE - SMALLEST_VALUE) // number_format.max_value


def max_contraction(a_format: BipolarFormat) -> int:
    """Largest K for which a sum of K products with values of activations fits int32; 65,793 at 8 bits."""
    return _INT32_MAX // (-SMALLEST_VALUE * a_format.max_value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class IntegerGroups:
    """The grid of every group: its code u has the value s * u + o, an int8. Always:

    - 1 <= s <= `largest_scale` of the format;
    - -128 <= s * u + o <= 127 for every code u of the format, present or not;
    - a number is S * (s * u + o), with one float scale S for each row. Groups of zeros have s = 1 and a code of
      value 0; where all of a row is zeros, S is 0 too.

    So int8 tensor cores multiply the values themselves, and int32 sums run over all of K (LiquidGEMM, arXiv
    2509.01229; QServe, arXiv 2405.04532).

    Attributes:
      scale: s.
      offset: o.
    """

    scale: UInt8[Array, "*rows groups"]
    offset: Int8[Array, "*rows groups"]

    def values(self, codes: UInt8[Array, "*rows k"], group_size: int) -> Int[Array, "*rows k"]:
        """s * u + o of every code, int32."""
        scale, offset = (spread_groups(a.astype(jnp.int32), codes.shape[-1], group_size) for a in self._terms)
        return scale * codes.astype(jnp.int32) + offset

    def codes(self, values: Integer[Array, "*rows k"], group_size: int) -> UInt8[Array, "*rows k"]:
        """The codes of values."""
        scale, offset = (spread_groups(a.astype(jnp.int32), values.shape[-1], group_size) for a in self._terms)
        return ((values.astype(jnp.int32) - offset) // scale).astype(jnp.uint8)

    def value_sums(self, code_sums: Int[Array, "*rows groups"], k: int, group_size: int) -> Int[Array, "*rows 1"]:
        """Sums of values over whole rows, int32, from the sums of codes of every group; NumPy's for NumPy's arrays."""
        lengths = along_last(group_lengths(k, group_size), code_sums.ndim)
        scale, offset = (a.astype(np.int32) for a in self._terms)
        return (scale * code_sums + offset * lengths).sum(axis=-1, keepdims=True, dtype=np.int32)

    def float_grid(
        self, row_scale: Float[Array, "*rows 1"], number_format: BipolarFormat
    ) -> tuple[Float[Array, "*rows groups"], Float[Array, "*rows groups"]]:
        """The scales and offsets of float groups on the same grid, float32: scale * (2 u - W) + offset."""
        scale, offset = (a.astype(jnp.float32) for a in self._terms)
        grid = scale * (row_scale / 2), (2 * offset + scale * number_format.max_value) * (row_scale / 2)
        # The barrier keeps the products from being fused with the sums that follow, which would round otherwise.
        return jax.lax.optimization_barrier(grid)

    def without_planes(self, dropped: int) -> IntegerGroups:
        """The grid of the codes' high planes: s' = 2^d s, and o' = o + floor(s (2^d - 1) / 2).

        The middle of the 2^d values that a shorter code stands for is o' or, for odd s, half an S above it.
        """
        scale, offset = (a.astype(np.int32) for a in self._terms)
        middle = scale * (2**dropped - 1) // 2
        return IntegerGroups((scale << dropped).astype(np.uint8), (offset + middle).astype(np.int8))

    def check_dtypes(self) -> None:
        """Raises ValueError unless scales are uint8 and offsets int8."""
        dtypes = [jnp.dtype(a.dtype).name for a in self._terms]
        if dtypes != ["uint8", "int8"]:
            raise ValueError(f"integer groups have scales in uint8 and offsets in int8, got {' and '.join(dtypes)}")

    def check(self, number_format: BipolarFormat, per_group: tuple[int, ...]) -> None:
        """Raises ValueError for other dtypes or another shape, a scale of 0, or a code whose value is outside int8.

        The numbers of traced arrays are not checked.
        """
        self.check_dtypes()
        for name, array in {"scales": self.scale, "offsets": self.offset}.items():
            if array.shape != per_group:
                raise ValueError(f"integer groups have {name} of shape {array.shape}: these codes need {per_group}")
        if any(isinstance(a, jax.core.Tracer) for a in self._terms):
            return
        scale, offset = (np.asarray(a, np.int32) for a in self._terms)
        top = offset + scale * number_format.max_value
        if scale.min() < 1 or top.max() > LARGEST_VALUE:
            raise ValueError(
                f"integer groups have scales from {scale.min()} and values up to {top.max()}: scales must be at least "
                f"1, and scale * {number_format.max_value} + offset at most {LARGEST_VALUE}"
            )

    @property
    def _terms(self) -> tuple[Integer[Array, "*rows groups"], Integer[Array, "*rows groups"]]:
        return self.scale, self.offset
