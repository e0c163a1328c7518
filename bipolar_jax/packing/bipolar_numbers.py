"""What arrays of bipolar numbers have in common, however their codes are stored."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.groups import along_last, group_lengths, num_groups
from bipolar_jax.quantize.integer_groups import IntegerGroups, check_scales, max_contraction
from bipolar_jax.quantize.rounding import from_grid


def static_field(**options: Any) -> Any:
    """A field of a pytree's dataclass that is no leaf."""
    return dataclasses.field(metadata={"static": True}, **options)


class _FieldKey(jax.tree_util.SequenceKey):
    """The key of a leaf: the name of a field in paths, an index to Orbax.

    Orbax restores leaves with names as a dict, and with indices as a list if there is no target. Flax's
    `replace_by_pure_dict` takes a list as the value of a variable, but looks for variables inside a dict.
    """

    def __init__(self, index: int, name: str):
        super().__init__(index)
        self.name = name

    def __str__(self) -> str:
        return f".{self.name}"


def register_numbers[Class: type](cls: Class) -> Class:
    """Registers a dataclass of bipolar numbers as a pytree, as `jax.tree_util.register_dataclass` but for the keys."""
    fields = dataclasses.fields(cls)
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    leaves = tuple(field.name for field in fields if field.name not in static)
    keys = tuple(map(_FieldKey, range(len(leaves)), leaves))

    def flatten(array):
        return tuple(getattr(array, name) for name in leaves), tuple(getattr(array, name) for name in static)

    def flatten_with_keys(array):
        children, values = flatten(array)
        return tuple(zip(keys, children, strict=True)), values

    def unflatten(values, children):
        return cls(**dict(zip(leaves, children, strict=True)), **dict(zip(static, values, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


class BipolarNumbers(abc.ABC):
    """Codes on the grid of `format`, with scales and offsets; see `BipolarArray`, which documents the attributes."""

    scale: Float[Array, "*batch n scales"]
    offset: Float[Array, "*batch n scales"] | None
    row_sums: Int[Array, "*batch n scales"]
    format: BipolarFormat
    contracted_size: int
    axis: int
    group_size: int | None
    groups: IntegerGroups | None

    @abc.abstractmethod
    def codes(self) -> UInt8[Array, "*batch n k"]:
        """Unsigned codes; the contracted axis is last for either `axis`."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises ValueError if the shapes of the leaves do not fit each other and the static attributes."""

    def truncate(self, bits: int) -> BipolarNumbers:
        """See `BipolarArray.truncate`, which has bit planes to drop.

        Raises:
          ValueError: the numbers are stored in another way.
        """
        raise ValueError(f"a {type(self).__name__} has no planes to drop: truncate the BipolarArray that it is made of")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.format.bits

    @property
    def has_integer_groups(self) -> bool:
        """Whether there are `groups`; computes nothing."""
        return self.groups is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        *batch, n, _ = self.row_sums.shape
        last_two = (self.contracted_size, n) if self.axis == -2 else (n, self.contracted_size)
        return (*batch, *last_two)

    @property
    def ndim(self) -> int:
        """Number of axes of `shape`."""
        return self.row_sums.ndim

    @property
    def num_groups(self) -> int:
        """Groups per row."""
        return num_groups(self.contracted_size, self.group_size)

    @property
    def scale_group_size(self) -> int | None:
        """Elements along k that share a float scale: `group_size`, or None with integer groups, for all of a row."""
        return None if self.has_integer_groups else self.group_size

    @property
    def nbytes(self) -> int:
        """Size of the leaves in memory, in bytes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> Self:  # noqa: N802 - numpy's name
        """The transpose of the last two axes; shares the data."""
        return dataclasses.replace(self, axis=-3 - self.axis)

    def __repr__(self) -> str:
        name = type(self).__name__
        leaves = [getattr(self, field.name) for field in dataclasses.fields(self) if not field.metadata.get("static")]
        if not hasattr(self.row_sums, "shape"):  # a tree_map has put other objects in the leaves, such as shardings
            return f"{name}({', '.join(map(str, leaves))})"
        offset = "" if self.offset is None else ", with offset"
        kind = ", integer groups" if self.has_integer_groups else ""
        kind += "".join(f", {name.replace('_', ' ')}" for name in ("gated", "for_floats") if getattr(self, name, False))
        return f"{name}(shape={self.shape}, bits={self.format.name}, group_size={self.group_size}{offset}{kind})"

    def values(self) -> Int[Array, "*shape"]:
        """Values 2 u - W, or s * u + o of integer groups, int32, in `shape`."""
        return _values(self)

    @property
    def signed_form(self) -> tuple[int, int]:
        """(f, r) of v = f c + r, with v the values and c the numbers of `signed_rows`."""
        return (1, 0) if self.has_integer_groups else (2, self.format.value_shift)

    def signed_rows(self) -> Int8[Array, "*batch n k"]:
        """Signed codes, or values of integer groups: the int8 numbers that are multiplied; the contracted axis last."""
        if not self.has_integer_groups:
            return self.format.signed_codes(self.codes())
        return self.groups.values(self.codes(), self.group_size).astype(jnp.int8)

    def value_sums(self) -> Int[Array, "*batch n scales"]:
        """Sums of the values that share a float scale, int32."""
        if self.has_integer_groups:
            return self.row_sums
        lengths = group_lengths(self.contracted_size, self.group_size)
        return 2 * self.row_sums - along_last(self.format.max_value * lengths, self.row_sums.ndim)

    def max_contraction(self, a_format: BipolarFormat) -> int:
        """Largest number of products with values of activations whose sum always fits int32."""
        return max_contraction(a_format) if self.has_integer_groups else self.format.max_contraction(a_format)

    def dequantize(self) -> Float[Array, "*shape"]:
        """scale * value + offset, float32, in `shape`."""
        return _dequantize(self)

    def with_scales(self) -> BipolarNumbers:
        """The same numbers as an array that has the float scales and offsets of its groups as leaves."""
        return self

    def _stored_groups(self) -> IntegerGroups | None:
        """`groups`, if they are leaves."""
        return self.groups

    def _as_shape(self, rows: Array) -> Array:
        return rows if self.axis == -1 else jnp.swapaxes(rows, -1, -2)

    def _misshaped(self, rows: tuple[int, ...]) -> list[str]:
        """Those of the arrays with numbers for each of `rows` that have another shape than they should, by name.

        Raises:
          ValueError: integer groups of a format or of dtypes that they cannot have, or beside float offsets.
        """
        per_scale = (*rows, num_groups(self.contracted_size, self.scale_group_size))
        arrays = {"scale": (self.scale, per_scale), "row_sums": (self.row_sums, per_scale)}
        arrays["offset"] = (self.offset, per_scale)
        if self.has_integer_groups:
            check_scales("integer", self.format, self.group_size)
            if self.offset is not None:
                raise ValueError("an array with integer groups has no float offsets: leave `offset` None")
        if (groups := self._stored_groups()) is not None:
            groups.check_dtypes()
            arrays["groups.scale"] = (groups.scale, (*rows, self.num_groups))
            arrays["groups.offset"] = (groups.offset, (*rows, self.num_groups))
        return [
            f"{name} {tuple(array.shape)} instead of {wanted}"
            for name, (array, wanted) in arrays.items()
            if array is not None and tuple(array.shape) != wanted
        ]


# Programs, so that an eager call makes one pass over the codes; within a trace they are inlined.
@functools.partial(jax.jit, inline=True)
def _values(array: BipolarNumbers) -> Int[Array, "*shape"]:
    return array._as_shape(_row_values(array))


@functools.partial(jax.jit, inline=True)
def _dequantize(array: BipolarNumbers) -> Float[Array, "*shape"]:
    if array.has_integer_groups:
        return array._as_shape(array.scale * _row_values(array).astype(jnp.float32))
    rows = from_grid(array.codes(), array.format, array.scale, array.offset, array.group_size)
    return array._as_shape(rows)


def _row_values(array: BipolarNumbers) -> Int[Array, "*batch n k"]:
    if array.groups is not None:
        return array.groups.values(array.codes(), array.group_size)
    return array.format.values(array.codes())
