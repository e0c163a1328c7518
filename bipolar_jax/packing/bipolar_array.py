"""`BipolarArray`, the quantized array: bit planes, scales, offsets and row sums."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.plane_sums import high_planes
from bipolar_jax.packing.words import num_words, unpack_codes
from bipolar_jax.quantize.groups import num_groups, split_groups
from bipolar_jax.quantize.rounding import from_grid


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class BipolarArray:
    """An array of bipolar numbers, packed along the axis that a matmul contracts.

    Make one with `bipolar_jax.quantize` or `from_codes`. It is a pytree: the four arrays
    are its leaves, the other attributes are static. Batch axes lead in every leaf, so it can
    be stacked, vmapped and scanned over like an array. Always:

    - number[..., n, k] = scale[..., n, g] * value[..., n, k] + offset[..., n, g], where g is
      the group of k and value an element of `format.grid()`;
    - bit b of `planes[..., i, n, w]` is bit i of the code of element k = 32 w + b, and 0 for
      k >= `contracted_size`;
    - `row_sums[..., n, g]` is the sum of the codes of group g of row n;
    - if `axis` is -2, `shape` is (..., k, n), the layout of a kernel; if it is -1, `shape` is
      (..., n, k), the layout of an embedding. `T` converts between them.

    Attributes:
      planes: bit planes, low plane first.
      scale: number per unit of value, float32; 0 for groups of zeros.
      offset: number that the value 0 stands for, float32; None if all are 0.
      row_sums: sums of codes, int32, stored because every product needs them.
      format: the grid.
      contracted_size: k, without padding.
      axis: position of k in `shape`, -1 or -2.
      group_size: elements along k that share a scale; the last group is shorter if
        `group_size` does not divide k. None for one group.
    """

    planes: UInt32[Array, "*batch planes n words"]
    scale: Float[Array, "*batch n groups"]
    offset: Float[Array, "*batch n groups"] | None
    row_sums: Int[Array, "*batch n groups"]
    format: BipolarFormat = _static()  # noqa: RUF009 - a field
    contracted_size: int = _static()
    axis: int = _static()
    group_size: int | None = _static()

    @property
    def bits(self) -> int:
        """Number of planes."""
        return self.format.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        *batch, _, n, _ = self.planes.shape
        last_two = (self.contracted_size, n) if self.axis == -2 else (n, self.contracted_size)
        return (*batch, *last_two)

    @property
    def ndim(self) -> int:
        """Number of axes of `shape`."""
        return self.planes.ndim - 1

    @property
    def num_groups(self) -> int:
        """Scales per row."""
        return num_groups(self.contracted_size, self.group_size)

    @property
    def nbytes(self) -> int:
        """Size of planes, scales, offsets and row sums in memory, in bytes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> BipolarArray:  # noqa: N802 - numpy's name
        """The transpose of the last two axes; shares the data."""
        return dataclasses.replace(self, axis=-3 - self.axis)

    def __repr__(self) -> str:
        if not hasattr(self.planes, "shape"):  # a tree_map has put other objects in the leaves, such as shardings
            return f"BipolarArray({self.planes}, {self.scale}, {self.offset}, {self.row_sums})"
        offset = "" if self.offset is None else ", with offset"
        return f"BipolarArray(shape={self.shape}, bits={self.format.name}, group_size={self.group_size}{offset})"

    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes; the contracted axis is last for either `axis`."""
        return _codes(self)

    def values(self) -> Int[Array, "*shape"]:
        """Values 2 u - W, int32, in `shape`."""
        return _values(self)

    def dequantize(self) -> Float[Array, "*shape"]:
        """scale * value + offset, float32, in `shape`."""
        return _dequantize(self)

    def truncate(self, bits: int) -> BipolarArray:
        """The array at fewer bits: keeps the high planes, and the offsets.

        The m high planes of n hold the codes that rounding the same numbers to the m-bit grid
        of scale * 2^(n - m) gives (nesting).

        Raises:
          ValueError: bits outside 1 ... `self.bits`, or a ternary format.
        """
        shorter = self.format.truncate(bits)
        dropped = self.bits - bits
        if dropped == 0:
            return self
        planes, row_sums = high_planes(self.planes, dropped, shorter, self.contracted_size, self.group_size)
        return dataclasses.replace(
            self, planes=planes, scale=self.scale * 2.0**dropped, row_sums=row_sums, format=shorter
        )

    def check(self) -> None:
        """Raises ValueError if the shapes of the leaves do not fit each other and the static attributes.

        They may not if leaves were replaced by hand, or were sharded along k, which packed
        words do not support.
        """
        *batch, planes, n, words = self.planes.shape
        per_group = (*batch, n, self.num_groups)
        shapes = {"scale": self.scale.shape, "row_sums": self.row_sums.shape}
        if self.offset is not None:
            shapes["offset"] = self.offset.shape
        wrong = [f"{name} {tuple(shape)}" for name, shape in shapes.items() if tuple(shape) != per_group]
        if planes != self.bits or words != num_words(self.contracted_size) or wrong:
            raise ValueError(
                f"inconsistent BipolarArray: planes {tuple(self.planes.shape)} should be "
                f"{(*batch, self.bits, n, num_words(self.contracted_size))} for bits={self.bits} and "
                f"contracted size {self.contracted_size}, and scales {per_group}; got {', '.join(wrong) or 'those'}. "
                "Shard it along n or a batch axis, not along the contracted one"
            )

    def _as_shape(self, rows: Array) -> Array:
        return rows if self.axis == -1 else jnp.swapaxes(rows, -1, -2)


# Programs, so that an eager call unpacks in one pass over the planes; within a trace they are inlined.
@functools.partial(jax.jit, inline=True)
def _codes(array: BipolarArray) -> UInt8[Array, "*batch n k"]:
    return unpack_codes(array.planes, array.format, array.contracted_size)


@functools.partial(jax.jit, inline=True)
def _values(array: BipolarArray) -> Int[Array, "*shape"]:
    return array._as_shape(array.format.values(array.codes()))


@functools.partial(jax.jit, inline=True)
def _dequantize(array: BipolarArray) -> Float[Array, "*shape"]:
    rows = from_grid(array.codes(), array.format, array.scale, array.offset, array.group_size)
    return array._as_shape(rows)


def code_sums(codes: UInt8[Array, "*batch n k"], group_size: int | None) -> Int[Array, "*batch n groups"]:
    """Sum of the codes of every group of every row, int32."""
    return jnp.sum(split_groups(codes, group_size), axis=-1, dtype=jnp.int32)
