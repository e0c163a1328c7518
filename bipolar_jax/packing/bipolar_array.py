"""`BipolarArray`, the quantized array: bit planes, scales, offsets or integer groups, and row sums."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers, register_numbers, static_field
from bipolar_jax.packing.float_terms import FloatTerms, narrowest_terms
from bipolar_jax.packing.plane_sums import high_planes, times_power_of_two
from bipolar_jax.packing.prepared_array import PreparedArray, check_preparable, has_float_groups, prepared
from bipolar_jax.packing.unpacked_array import UnpackedArray
from bipolar_jax.packing.words import num_words, unpack_codes
from bipolar_jax.quantize.groups import in_blocks, split_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups, check_scales
from bipolar_jax.quantize.integer_scale_search import integer_groups_of_codes, moments_of_codes
from bipolar_jax.quantize.rounding import check_finite


@register_numbers
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class BipolarArray(BipolarNumbers):
    """An array of bipolar numbers, packed along the axis that a matmul contracts.

    Make one with `bipolar_jax.quantize` or `from_codes`. It is a pytree: arrays are its
    leaves, the other attributes are static. Batch axes lead in every leaf, so it can
    be stacked, vmapped and scanned over like an array. Always:

    - number[..., n, k] = scale[..., n, g] * value[..., n, k] + offset[..., n, g], where g is
      the group of k and value an element of `format.grid()`;
    - with integer groups, number[..., n, k] = scale[..., n, 0] * value[..., n, k], where value is
      groups.scale[..., n, g] * code[..., n, k] + groups.offset[..., n, g], an int8;
    - bit b of `planes[..., i, n, w]` is bit i of the code of element k = 32 w + b, and 0 for
      k >= `contracted_size`;
    - `row_sums[..., n, g]` is the sum of the codes of group g of row n; with integer groups,
      `row_sums[..., n, 0]` is the sum of the values of row n;
    - if `axis` is -2, `shape` is (..., k, n), the layout of a kernel; if it is -1, `shape` is
      (..., n, k), the layout of an embedding. `T` converts between them.

    Attributes:
      planes: bit planes, low plane first.
      scale: number per unit of value, float32; 0 where all numbers that share it are zeros.
      offset: number that the value 0 stands for, float32; None if all are 0, and with integer groups.
      row_sums: sums of codes, or of values with integer groups, int32; stored because every product needs them.
      format: the grid.
      contracted_size: k, without padding.
      axis: position of k in `shape`, -1 or -2.
      group_size: elements along k that share a scale; the last group is shorter if
        `group_size` does not divide k. None for one group.
      groups: integer scales and offsets of the groups; None if the scales of groups are floats.
    """

    planes: UInt32[Array, "*batch planes n words"]
    scale: Float[Array, "*batch n scales"]
    offset: Float[Array, "*batch n scales"] | None
    row_sums: Int[Array, "*batch n scales"]
    format: BipolarFormat = static_field()  # noqa: RUF009 - a field
    contracted_size: int = static_field()
    axis: int = static_field()
    group_size: int | None = static_field()
    groups: IntegerGroups | None = None

    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes; the contracted axis is last for either `axis`."""
        return _codes(self)

    def unpack(self) -> UnpackedArray:
        """The same numbers with one byte for each code, which CPUs multiply faster than bit planes."""
        return _unpack(self)

    def prepare(
        self, *, gated: bool = False, float_terms: FloatTerms | None = None, for_floats: bool = False
    ) -> PreparedArray:
        """The same numbers, laid out as tensor cores multiply them.

        Args:
          gated: whether the columns are gates followed by as many values, which a gated activation will take.
          float_terms: the form of float scales of groups, one that is exact (`packing.float_terms`); None takes the
            smallest that is.
          for_floats: whether activations are 16-bit floats, which are then multiplied as they lie in memory; quantized
            ones may be multiplied, too, after a pass that reorders them. Without it floats take that pass.

        Raises:
          ValueError: groups that are no multiple of 16 elements; gates of an odd number.
        """
        check_preparable(self, gated)
        if not has_float_groups(self):
            float_terms = None
        elif float_terms is None:
            float_terms = narrowest_terms(self.scale, self.offset, self.format)
        return _prepare(self, gated, float_terms, for_floats)

    def to_integer_groups(self) -> tuple[BipolarArray, Float[Array, "*batch"]]:
        """The same codes with integer groups in place of the float ones, so that products sum over all of K in int32.

        The integers are those of least squared error for these codes. Codes that are rounded again can have less:
        where the floats are at hand, use `quantize(..., scales="integer")`. At 1 to 4 bits rounding to the codes has
        moved the weights far more than this does, at 5 bits about as much, at 6 far less.

        Returns:
          The array; the squared difference of each matrix of the batch, relative to the sum of its squares. It is 0,
          and the array unchanged, if it has integer groups already.

        Raises:
          ValueError: an array without groups, or of more than 6 bits; scales below zero, NaN or Inf (in traced arrays
            the scale of their row becomes NaN).
        """
        if self.groups is not None:
            return self, jnp.zeros(self.row_sums.shape[:-2], jnp.float32)
        _check_float_groups(self)
        return _to_integer_groups(self)

    def truncate(self, bits: int) -> BipolarArray:
        """The array at fewer bits: keeps the high planes, and the offsets.

        The m high planes of n hold the codes that rounding the same numbers to the m-bit grid
        of scale * 2^(n - m) gives (nesting). Integer groups may be half a `scale` away from that
        grid, see `IntegerGroups.without_planes`.

        Raises:
          ValueError: bits outside 1 ... `self.bits`, or a ternary format.
        """
        shorter = self.format.truncate(bits)
        dropped = self.bits - bits
        if dropped == 0:
            return self
        planes, sums = high_planes(self.planes, dropped, shorter, self.contracted_size, self.group_size)
        if self.groups is None:
            scale = times_power_of_two(self.scale, dropped)
            return dataclasses.replace(self, planes=planes, scale=scale, row_sums=sums, format=shorter)
        groups = self.groups.without_planes(dropped)
        sums = groups.value_sums(sums, self.contracted_size, self.group_size)
        return dataclasses.replace(self, planes=planes, row_sums=sums, format=shorter, groups=groups)

    def check(self) -> None:
        """Raises ValueError if the leaves do not fit each other and the static attributes.

        They may not if leaves were replaced by hand, or are those of one device, cut along k, in `jax.shard_map`.
        """
        *batch, planes, n, words = self.planes.shape
        wrong = self._misshaped((*batch, n))
        if planes != self.bits or words != num_words(self.contracted_size) or wrong:
            raise ValueError(
                f"inconsistent BipolarArray: planes {tuple(self.planes.shape)} should be "
                f"{(*batch, self.bits, n, num_words(self.contracted_size))} for bits={self.bits} and "
                f"contracted size {self.contracted_size}; got {', '.join(wrong) or 'those'}. "
                "If they are cut along k, in jax.shard_map, give `matmul` its k_axes, or take `packing.cuts.own_part`"
            )


# Programs, so that an eager call unpacks in one pass over the planes; within a trace they are inlined.
@functools.partial(jax.jit, inline=True)
def _codes(array: BipolarArray) -> UInt8[Array, "*batch n k"]:
    return unpack_codes(array.planes, array.format, array.contracted_size)


@functools.partial(jax.jit, inline=True)
def _unpack(array: BipolarArray) -> UnpackedArray:
    return UnpackedArray(
        jnp.moveaxis(split_groups(array.signed_rows(), array.scale_group_size), -2, -3),
        array.scale,
        array.offset,
        array.row_sums,
        array.format,
        array.contracted_size,
        array.axis,
        array.group_size,
        array.groups,
    )


@functools.partial(jax.jit, inline=True)
def _to_integer_groups(array: BipolarArray) -> tuple[BipolarArray, Float[Array, "*batch"]]:
    *batch, bits, n, words = array.planes.shape

    def moments(rows):
        planes = jnp.swapaxes(rows.reshape(-1, bits, words), 0, 1)
        return moments_of_codes(unpack_codes(planes, array.format, array.contracted_size), array.group_size)

    rows = jnp.swapaxes(array.planes, -2, -3).reshape(-1, bits * words)
    mean, variance = (a.reshape(*batch, n, -1) for a in in_blocks(moments, rows))
    scale, groups, error = integer_groups_of_codes(
        mean, variance, array.scale, array.offset, array.format, array.contracted_size, array.group_size
    )
    sums = groups.value_sums(array.row_sums, array.contracted_size, array.group_size)
    return dataclasses.replace(array, scale=scale, offset=None, row_sums=sums, groups=groups), error


@functools.partial(jax.jit, static_argnames=("gated", "float_terms", "for_floats"), inline=True)
def _prepare(array: BipolarArray, gated: bool, float_terms: FloatTerms | None, for_floats: bool) -> PreparedArray:
    return prepared(array, gated, float_terms, for_floats)


def _check_float_groups(array: BipolarArray) -> None:
    """Raises ValueError unless the array has float groups that become integer ones."""
    if array.group_size is None:
        raise ValueError(f"{array} has one scale for each channel, and no groups: its products need no integer scales")
    check_scales("integer", array.format, array.group_size)
    check_finite(array.scale, "the array of scales")
    if array.offset is not None:
        check_finite(array.offset, "the array of offsets")
    if not isinstance(array.scale, jax.core.Tracer):
        with jax.core.eval_context():  # the values are known, even if the caller is traced or in a shard_map
            smallest = float(array.scale.min())
        if smallest < 0:
            raise ValueError(f"scales go down to {smallest:.3g}: integer groups have none below 0, so quantize again")


def code_sums(codes: UInt8[Array, "*batch n k"], group_size: int | None) -> Int[Array, "*batch n groups"]:
    """Sum of the codes of every group of every row, int32."""
    return jnp.sum(split_groups(codes, group_size), axis=-1, dtype=jnp.int32)
