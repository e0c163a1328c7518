"""A quantized array: bit planes, scales, and what kernels need beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from bipolar_jax.format import BipolarFormat
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
    are its leaves, the rest is static. Leading batch axes are the leaves' leading axes, so
    it can be stacked, vmapped and scanned over like an array. These always hold:

    - number[..., n, k] = scale[..., n, g] * value[..., n, k] + offset[..., n, g], g being
      the group of k, and value an element of `format.grid()`;
    - bit b of `planes[..., i, n, w]` is bit i of the code of element k = 32 w + b, and 0
      where k is not below `contracted_size`;
    - `row_sums[..., n, g]` is the sum of the codes of group g of row n;
    - `axis` -2 means that `shape` is (..., k, n), the layout of a kernel; -1 that it is
      (..., n, k), the layout of an embedding. `T` turns one into the other.

    Attributes:
      planes: bits, low plane first.
      scale: size of one unit of value, float32; 0 for groups of zeros.
      offset: number that value 0 stands for, float32; None if it is 0 everywhere.
      row_sums: sums of codes, made once so that kernels need not.
      format: the grid.
      contracted_size: k, without the bits that fill the last word.
      axis: where k stands in `shape`, -1 or -2.
      group_size: elements along k that share a scale, the last group being shorter if
        k is no multiple; None for one group.
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
        """Shape of the array that this stands for."""
        *batch, _, n, _ = self.planes.shape
        last_two = (self.contracted_size, n) if self.axis == -2 else (n, self.contracted_size)
        return (*batch, *last_two)

    @property
    def ndim(self) -> int:
        return self.planes.ndim - 1

    @property
    def num_groups(self) -> int:
        """Scales per row."""
        return num_groups(self.contracted_size, self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes that planes, scales, offsets and row sums really occupy."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> BipolarArray:  # noqa: N802 - numpy's name
        """The last two axes swapped; no data moves."""
        return dataclasses.replace(self, axis=-3 - self.axis)

    def __repr__(self) -> str:
        if not hasattr(self.planes, "shape"):  # a pytree of something else, such as shardings
            return f"BipolarArray({self.planes}, {self.scale}, {self.offset}, {self.row_sums})"
        offset = "" if self.offset is None else ", with offset"
        return f"BipolarArray(shape={self.shape}, bits={self.format.name}, group_size={self.group_size}{offset})"

    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes, contracted axis last, whatever `axis` is."""
        return unpack_codes(self.planes, self.format, self.contracted_size)

    def values(self) -> Int[Array, "*shape"]:
        """The integers of the grid, int32, in `shape`."""
        return self._as_shape(self.format.values(self.codes()))

    def dequantize(self) -> Float[Array, "*shape"]:
        """scale * value + offset, float32, in `shape`."""
        return self._as_shape(from_grid(self.codes(), self.format, self.scale, self.offset, self.group_size))

    def truncate(self, bits: int) -> BipolarArray:
        """The same array at fewer bits: keeps the top planes and requantizes nothing.

        The top m of n planes are the codes that rounding to nearest gives on the m-bit
        grid of scale * 2^(n - m) (nesting).

        Raises:
          ValueError: more bits than there are, or a ternary format.
        """
        shorter = self.format.truncate(bits)
        dropped = self.bits - bits
        if dropped == 0:
            return self
        planes = self.planes[..., dropped:, :, :]
        return dataclasses.replace(
            self,
            planes=planes,
            scale=self.scale * 2.0**dropped,
            row_sums=code_sums(unpack_codes(planes, shorter, self.contracted_size), self.group_size),
            format=shorter,
        )

    def check(self) -> None:
        """Raises ValueError unless the leaves' shapes agree with each other and with k.

        A pytree can be put together wrongly by hand, or sharded along k, which the
        packed words do not allow.
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


def code_sums(codes: UInt8[Array, "*batch n k"], group_size: int | None) -> Int[Array, "*batch n groups"]:
    """Sum of the codes of every group of every row."""
    return jnp.sum(split_groups(codes, group_size), axis=-1, dtype=jnp.int32)
