"""How arrays of bipolar numbers are cut over the devices of a mesh.

The spec of an array is that of its logical shape, such as P(None, "model") of a kernel [k, n]. Batch axes and n are cut
anywhere. The contracted axis k is cut where words and groups end; scales, offsets, sums and integers of groups are cut
along. What all of k shares (one scale a row, its sum) is on every device.

Where sizes do not divide, a device that has the whole array takes its range of it, padded to the size that all devices
have: `taken_columns`, `taken_rows`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, UInt32

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing.bipolar_array import BipolarArray
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers
from bipolar_jax.packing.plane_sums import plane_sums
from bipolar_jax.packing.unpacked_array import UnpackedArray
from bipolar_jax.packing.words import WORD_BITS, num_words
from bipolar_jax.quantize.groups import along_last
from bipolar_jax.quantize.integer_groups import IntegerGroups

# The mesh axes that one axis of an array is cut over.
MeshAxes = str | tuple[str, ...] | None


def partition_specs(
    w: BipolarNumbers, spec: PartitionSpec, rules: Mapping[str, MeshAxes] | None = None
) -> BipolarNumbers:
    """The specs of an array's leaves, as a pytree of its structure: an operand of `jax.shard_map` and of `jax.jit`.

    Args:
      w: a `BipolarArray`, or what its `unpack` makes; arrays or their shapes and dtypes.
      spec: mesh axes of each axis of `w.shape`; axes that it does not name are not cut.
      rules: mesh axes by logical name, if `spec` has logical names; names without a rule are not cut.

    Raises:
      ValueError: a spec of more axes than the array has, or of a mesh axis twice; an array that was laid out for
        tensor cores, which is prepared after it is cut.
    """
    _check_kind(w)
    *batch, rows, columns = _axes_of(w, spec, rules)
    k, n = (rows, columns) if w.axis == -2 else (columns, rows)
    of_group = k if w.num_groups > 1 else None
    of_scale = None if w.has_integer_groups else of_group
    per_scale, per_group = (PartitionSpec(*batch, n, axes) for axes in (of_scale, of_group))
    if isinstance(w, BipolarArray):
        codes = {"planes": PartitionSpec(*batch, None, n, k)}
    elif of_scale is None:
        codes = {"signed_codes": PartitionSpec(*batch, None, n, k)}
    else:
        codes = {"signed_codes": PartitionSpec(*batch, of_scale, n, None)}
    groups = None if w.groups is None else dataclasses.replace(w.groups, scale=per_group, offset=per_group)
    return dataclasses.replace(
        w,
        **codes,
        scale=per_scale,
        offset=None if w.offset is None else per_scale,
        row_sums=per_scale,
        groups=groups,
    )


def shardings(
    w: BipolarNumbers, mesh: Mesh | AbstractMesh, spec: PartitionSpec, rules: Mapping[str, MeshAxes] | None = None
) -> BipolarNumbers:
    """`partition_specs` as shardings on a mesh, for `jax.device_put`.

    Raises:
      ValueError: as `partition_specs`; axes that the mesh lacks; sizes that the devices do not divide.
    """
    specs = partition_specs(w, spec, rules)
    check_cut(w, mesh.shape, _axes_of(w, spec, rules))
    return jax.tree.map(lambda leaf: NamedSharding(mesh, leaf), specs, is_leaf=_is_spec)


def shard(
    w: BipolarNumbers, mesh: Mesh, spec: PartitionSpec, rules: Mapping[str, MeshAxes] | None = None
) -> BipolarNumbers:
    """The array cut over the devices of a mesh; the numbers stay the same.

    `matmul` partitions itself within `jax.jit`: each device multiplies its own part of w.

    Raises:
      ValueError: as `shardings`.
    """
    return jax.device_put(w, shardings(w, mesh, spec, rules))


def cut_unit(w: BipolarNumbers) -> int:
    """Elements of k that stay together: whole words, and whole groups."""
    word = WORD_BITS if isinstance(w, BipolarArray) else 1
    has_groups = w.has_integer_groups or w.num_groups > 1
    return math.lcm(word, w.group_size) if has_groups else word


def check_cut(w: BipolarNumbers, sizes: Mapping[str, int], axes: tuple[MeshAxes, ...]) -> None:
    """Raises ValueError unless devices divide an array evenly, and its k at ends of words and groups.

    Args:
      w: the array.
      sizes: devices along each axis of the mesh.
      axes: mesh axes of each axis of `w.shape`.
    """
    for place, names in enumerate(axes, start=-w.ndim):
        if unknown := [name for name in _names(names) if name not in sizes]:
            raise ValueError(f"the mesh has the axes {', '.join(sizes)}, not {unknown[0]!r}")
        parts = math.prod(sizes[name] for name in _names(names))
        if place == w.axis:
            check_contracted_cut(w, parts)
        elif w.shape[place] % parts:
            raise ValueError(
                f"axis {place} of shape {w.shape} has {w.shape[place]} elements, which {parts} devices "
                f"({names}) do not divide: cut it over a divisor, or leave it whole"
            )


def check_contracted_cut(w: BipolarNumbers, parts: int) -> None:
    """Raises ValueError unless k falls into so many equal parts of whole words and groups."""
    unit = cut_unit(w)
    if parts > 1 and w.contracted_size % (parts * unit):
        why = f"words of {WORD_BITS}" if isinstance(w, BipolarArray) else "bytes"
        why += f", groups of {w.group_size}" if unit % WORD_BITS or unit > WORD_BITS else ""
        raise ValueError(
            f"k={w.contracted_size} of {w} cannot be cut into {parts} parts of a multiple of {unit} elements ({why}): "
            "cut it over fewer devices, cut n instead, or leave it whole"
        )


def part_for_sum(w: BipolarNumbers, parts: int, is_first: Bool[Array, ""]) -> BipolarNumbers:
    """One device's part of an array whose leaves are cut along k, such that the parts' integer products add up.

    Products are linear in row sums, so the first part takes those of all of k and the others take zeros; a product of
    one part alone means nothing. Float scales of groups have sums of their own, which are cut along with them.

    Args:
      w: the array, its leaves cut into `parts` along k as `partition_specs` says, and `contracted_size` that of all.
      parts: number of devices.
      is_first: whether this device has the first part.
    """
    if w.has_integer_groups or w.num_groups == 1:
        w = dataclasses.replace(w, row_sums=jnp.where(is_first, w.row_sums, 0))
    return _shortened(w, parts)


def own_part(w: BipolarArray, parts: int) -> BipolarArray:
    """The same part as an array in its own right, with the row sums of its own codes, counted here.

    Raises:
      ValueError: leaves that are not cut into `parts`.
    """
    part = _shortened(w, parts)
    if w.has_integer_groups or w.num_groups == 1:
        sums = _own_sums(part.planes, part.format, part.contracted_size, part.group_size, part.groups)
        part = dataclasses.replace(part, row_sums=sums)
    part.check()
    return part


def taken_columns(w: BipolarArray, start: Int[Array, ""], count: Int[Array, ""], size: int) -> BipolarArray:
    """Columns start ... start + count of the array, and columns of zeros behind them: `size` in all."""
    take = functools.partial(taken, axis=-2, start=start, count=count, size=size)
    groups = w.groups
    if groups is not None:
        groups = dataclasses.replace(groups, scale=take(groups.scale, fill=1), offset=take(groups.offset))
    offset = None if w.offset is None else take(w.offset)
    return dataclasses.replace(
        w, planes=take(w.planes), scale=take(w.scale), offset=offset, row_sums=take(w.row_sums), groups=groups
    )


def taken_rows(
    w: BipolarArray, start: Int[Array, ""], count: Int[Array, ""], size: int, group_size: int | None
) -> BipolarArray:
    """Rows start ... start + count of the array, and rows behind them that add nothing: `size` in all.

    The padding has the value 0 where groups have integer scales, and the scale 0 where they have float ones. With one
    scale a column, whose grid may have no 0, it alternates between the smallest and the largest value: tokens whose
    numbers are 0 there have one code for all of them, and products and sums of values cancel exactly.

    Args:
      w: an array with axis=-2.
      start: first row; a multiple of `group_size`.
      count: rows of the array; a multiple of `group_size`, and even as `size` is where columns have one scale.
      size: rows of the result.
      group_size: a divisor of w's, so that groups end where the range does; None where columns have one scale.

    Raises:
      ValueError: a group size that does not divide that of w.
    """
    words = num_words(size)
    first, shift = start // WORD_BITS, (start % WORD_BITS).astype(jnp.uint32)
    low, high = (taken(w.planes, -1, first + i, w.planes.shape[-1] - first - i, words) for i in range(2))
    # A shift by 32 bits has no meaning.
    joined = (low >> shift) | jnp.where(shift == 0, jnp.uint32(0), high << ((WORD_BITS - shift) % WORD_BITS))
    ours, ends = (along_last(_first_bits(n, words), joined.ndim) for n in (count, jnp.int32(size)))
    padding = jnp.uint32(0xAAAAAAAA) & ends & ~ours if group_size is None else jnp.uint32(0)
    planes = (joined & ours) | padding
    terms = {"scale": w.scale, "offset": w.offset, "groups": w.groups}
    if group_size is not None:
        if w.group_size is None or w.group_size % group_size:
            raise ValueError(f"{w} has groups of {w.group_size}: groups of {group_size} do not divide them")
        take = functools.partial(_taken_groups, start // group_size, count // group_size, size // group_size)
        ratio = w.group_size // group_size
        if w.groups is None:
            terms["scale"], terms["offset"] = take(ratio, w.scale), None if w.offset is None else take(ratio, w.offset)
        else:
            terms["groups"] = IntegerGroups(take(ratio, w.groups.scale, fill=1), take(ratio, w.groups.offset))
    sums = _own_sums(planes, w.format, size, group_size, terms["groups"])
    static = {"contracted_size": size, "group_size": group_size}
    part = dataclasses.replace(w, planes=planes, row_sums=sums, **static, **terms)
    part.check()
    return part


def taken(x: Array, axis: int, start: Int[Array, ""], count: Int[Array, ""], size: int, fill: int = 0) -> Array:
    """Elements start ... start + count of an axis, and `fill` behind them: `size` in all."""
    at = jnp.arange(size, dtype=jnp.int32)
    mask = (at < count).reshape(-1, *[1] * (-1 - axis))
    elements = jnp.take(x, start + at, axis=axis, mode="clip")
    return jnp.where(jnp.broadcast_to(mask, elements.shape), elements, jnp.asarray(fill, x.dtype))


def _taken_groups(start, count, size: int, ratio: int, x: Array, fill: int = 0) -> Array:
    """`taken` of what each group has, where `ratio` shorter groups are made of each."""
    return taken(jnp.repeat(x, ratio, axis=-1), -1, start, count, size, fill)


def _first_bits(count: Int[Array, ""], words: int) -> UInt32[Array, " words"]:
    """Words whose first `count` bits are 1, and the others 0."""
    bits = jnp.clip(count - WORD_BITS * jnp.arange(words, dtype=jnp.int32), 0, WORD_BITS)
    some = (jnp.uint32(1) << (bits % WORD_BITS).astype(jnp.uint32)) - jnp.uint32(1)
    return jnp.where(bits == WORD_BITS, jnp.uint32(0xFFFFFFFF), some)


def _own_sums(
    planes: UInt32[Array, "*batch planes n words"],
    number_format: BipolarFormat,
    k: int,
    group_size: int | None,
    groups: IntegerGroups | None,
) -> Int[Array, "*batch n scales"]:
    """`BipolarArray.row_sums` of these codes, counted here."""
    sums = plane_sums(planes, number_format, k, group_size)
    return sums if groups is None else groups.value_sums(sums, k, group_size)


def _shortened(w: BipolarNumbers, parts: int) -> BipolarNumbers:
    """The array with the k of one of so many parts; one group of all of k is one of the part."""
    group_size = w.group_size if w.has_integer_groups or w.num_groups > 1 else None
    return dataclasses.replace(w, contracted_size=w.contracted_size // parts, group_size=group_size)


def _axes_of(w: BipolarNumbers, spec: PartitionSpec, rules: Mapping[str, MeshAxes] | None) -> tuple[MeshAxes, ...]:
    """Mesh axes of each axis of `w.shape`."""
    if not isinstance(spec, PartitionSpec | tuple):
        raise ValueError(f"the spec must be a jax.sharding.PartitionSpec, got {spec!r:.60}")
    if len(spec) > w.ndim:
        raise ValueError(f"the spec {spec} has {len(spec)} axes, {w} has {w.ndim}")
    axes = (*spec, *[None] * (w.ndim - len(spec)))
    if rules is not None:
        named = ([rules.get(name) for name in _names(names)] for names in axes)
        axes = tuple(_joined(name for mesh_axes in found for name in _names(mesh_axes)) for found in named)
    names = [name for axis in axes for name in _names(axis)]
    if len(set(names)) < len(names):
        raise ValueError(f"the spec {spec} of {w} uses a mesh axis twice: {names}")
    return axes


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _joined(names: Any) -> MeshAxes:
    names = tuple(names)
    return None if not names else names[0] if len(names) == 1 else names


def _check_kind(w: BipolarNumbers) -> None:
    if not isinstance(w, BipolarNumbers):
        raise ValueError(f"only packed arrays have parts to cut, got {type(w).__name__}: jax.device_put cuts others")
    if not isinstance(w, BipolarArray | UnpackedArray):
        raise ValueError(f"{w} is a {type(w).__name__}: cut the BipolarArray that it is made of, and prepare the parts")


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
