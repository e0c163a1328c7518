"""The Flax variable that holds packed weights, and the base of the modules that have one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from bipolar_jax.nn.layers.serialization import from_list
from bipolar_jax.packing import BipolarNumbers


class Packed(nnx.Variable):
    """The variable of a module that holds a `BipolarArray`.

    It is not an `nnx.Param`, because packed bits have no gradient: `nnx.grad` and optimizers,
    which by default select `nnx.Param`, leave it out.

    Metadata:
      float_shape: shape of the float weights of one layer, if the array holds them folded into other axes.
      folded_ndim: axes of one layer's array, given with `float_shape`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float weights, of which models read numbers of heads and the like."""
        shape, float_shape = tuple(self.get_value().shape), self.get_metadata("float_shape", None)
        return shape if float_shape is None else (*shape[: len(shape) - self.folded_ndim], *float_shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the float weights."""
        return len(self.shape)

    def replace(self, *arguments: Any, **metadata: Any) -> Packed:
        """As Flax's; a list in place of the array has its leaves, as Orbax restores it without a target."""
        array = self.get_value()
        if arguments and isinstance(arguments[0], list) and isinstance(array, BipolarNumbers):
            arguments = (from_list(array, arguments[0]), *arguments[1:])
        return super().replace(*arguments, **metadata)

    def __nnx_repr__(self) -> Iterator[Any]:
        """As Flax prints variables, with the number of parameters in place of that of packed words."""
        return _with_comment(super().__nnx_repr__(), _count({type(self): [self]}))


def folded(array: BipolarNumbers, float_shape: tuple[int, ...], folded_ndim: int) -> Packed:
    """The variable for weights of `float_shape` that are folded into the last `folded_ndim` axes of an array."""
    if array.shape[array.ndim - folded_ndim :] == float_shape:
        return Packed(array)
    return Packed(array, float_shape=float_shape, folded_ndim=folded_ndim)


class CountedModule(nnx.Module):
    """The base of modules whose repr counts parameters, where Flax's would count packed words."""

    def __nnx_repr__(self) -> Iterator[Any]:
        """As Flax prints modules, with the number of parameters in place of that of packed words."""
        by_type: dict[type, list[nnx.Variable]] = {}
        for _, variable in nnx.to_flat_state(nnx.state(self)):
            by_type.setdefault(type(variable), []).append(variable)
        return _with_comment(super().__nnx_repr__(), _count(by_type))


class PackedModule(CountedModule):
    """The base of layers with packed weights."""


def num_parameters(value: Any) -> int:
    """The numbers that a variable's value holds; those of a packed array are not its words."""
    leaves = jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, BipolarNumbers))
    return sum(math.prod(leaf.shape) for leaf in leaves if hasattr(leaf, "shape"))


def num_bytes(value: Any) -> int:
    """The memory of a variable's value in bytes, with scales, offsets and row sums."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype"))


def format_bytes(size: float) -> str:
    """A size as text, such as "1.3 KB"; KB are 1024 bytes."""
    units = ("B", "KB", "MB", "GB", "TB")
    index = 0
    while size >= 1024 and index < len(units) - 1:
        size, index = size / 1024, index + 1
    return f"{size:.1f} {units[index]}" if index else f"{size} B"


def _count(variables: dict[type, list[nnx.Variable]]) -> str:
    counts = {}
    for kind, members in variables.items():
        values = [variable.get_value() for variable in members]
        arrays = [value for value in values if isinstance(value, BipolarNumbers)]
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(arrays)):
            return ""  # a tree_map has put other objects in the leaves
        counts[kind.__name__] = sum(map(num_parameters, values)), sum(map(num_bytes, values))
    if len(counts) > 1:
        counts["Total"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return ", ".join(f"{name}: {count:,} ({format_bytes(size)})" for name, (count, size) in counts.items())


def _with_comment(lines: Iterator[Any], comment: str) -> Iterator[Any]:
    """Flax's representation with another comment in its head."""
    head = next(lines)
    yield dataclasses.replace(head, comment=f" # {comment}") if comment and getattr(head, "comment", "") else head
    yield from lines
