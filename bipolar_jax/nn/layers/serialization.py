"""Packed arrays in the formats of Flax, Orbax and `jax.export`: registered on import."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax.serialization
import jax
import jax.export
from flax.traverse_util import flatten_dict

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray, BipolarNumbers, BlockScaledArray, PreparedArray, UnpackedArray
from bipolar_jax.packing.block_scaled_array import BlockForm
from bipolar_jax.quantize import IntegerGroups


def _names(kind: type[BipolarNumbers], *, static: bool) -> tuple[str, ...]:
    """The fields that are static, in the order of the pytree's auxiliary data, or the leaves."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.metadata.get("static", False) == static)


def from_list(target: BipolarNumbers, values: Sequence[Any]) -> BipolarNumbers:
    """The packed array whose leaves Orbax restored, without a target, as a list.

    Args:
      target: an array of the same structure, also an abstract one.
      values: its leaves in order, None for those that it does not have; integer groups as a dict.

    Raises:
      ValueError: leaves missing or in excess, or of other shapes or dtypes than the target's.
    """
    names = _names(type(target), static=False)
    if len(values) != len(names):
        raise ValueError(f"the packed array has the leaves {', '.join(names)}, got a list of {len(values)}")
    flat = {}
    for name, value in zip(names, values, strict=True):
        flat |= {(name, key): leaf for key, leaf in value.items()} if isinstance(value, Mapping) else {(name,): value}
    return _with_leaves(target, flat)


def _with_leaves[Kind: BipolarNumbers](target: Kind, leaves: Mapping[tuple[str, ...], Any]) -> Kind:
    """The target with other leaves of the same shapes and dtypes; absent offsets or groups may be None or missing."""
    leaves = {path: leaf for path, leaf in leaves.items() if leaf is not None}
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    expected = {tuple(key.name for key in path): leaf for path, leaf in paths_and_leaves}
    found, wanted = (
        {".".join(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in sorted(each.items())}
        for each in (leaves, expected)
    )
    if found != wanted:
        raise ValueError(f"the packed array has the leaves {found}, but its target {wanted}")
    return structure.unflatten([leaves[path] for path in expected])


def _static_fields(array: BipolarArray) -> dict[str, Any]:
    """The static attributes as numbers, for files."""
    return {
        "bits": array.format.bits,
        "ternary": array.format.ternary,
        "contracted_size": array.contracted_size,
        "axis": array.axis,
        "group_size": array.group_size,
    }


def _to_state_dict(array: BipolarArray) -> dict[str, Any]:
    leaves = {key: getattr(array, key) for key in _names(BipolarArray, static=False)}
    if array.groups is not None:
        leaves["groups"] = {"scale": array.groups.scale, "offset": array.groups.offset}
    return leaves | _static_fields(array)


def _from_state_dict(target: BipolarArray, state: Mapping[str, Any]) -> BipolarArray:
    static = _static_fields(target)
    found = {key: state.get(key) for key in static}
    if found != static:
        raise ValueError(f"the packed array has {found}, but its target {static}")
    return _with_leaves(target, flatten_dict({key: value for key, value in state.items() if key not in static}))


def _serialize_static(kind: type[BipolarNumbers], values: tuple) -> bytes:
    fields = dict(zip(_names(kind, static=True), values, strict=True))
    number_format = fields.pop("format")
    if "form" in fields:
        fields["form"] = dataclasses.asdict(fields["form"])
    return json.dumps({"bits": number_format.bits, "ternary": number_format.ternary, **fields}).encode()


def _deserialize_static(kind: type[BipolarNumbers], data: bytes) -> tuple:
    fields = {"for_floats": False, **json.loads(data)}  # which programs that were exported without it lack
    if "form" in fields:
        fields["form"] = BlockForm(**fields["form"])
    fields["format"] = BipolarFormat(fields.pop("bits"), ternary=fields.pop("ternary"))
    return tuple(fields[name] for name in _names(kind, static=True))


def _from_children(kind: type[BipolarNumbers], static: tuple, children: tuple) -> BipolarNumbers:
    fields = dict(zip(_names(kind, static=False), children, strict=True))
    return kind(**fields, **dict(zip(_names(kind, static=True), static, strict=True)))


flax.serialization.register_serialization_state(BipolarArray, _to_state_dict, _from_state_dict)
for _kind in (BipolarArray, BlockScaledArray, UnpackedArray, PreparedArray):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"bipolar_jax.{_kind.__name__}",
        serialize_auxdata=functools.partial(_serialize_static, _kind),
        deserialize_auxdata=functools.partial(_deserialize_static, _kind),
        from_children=functools.partial(_from_children, _kind),
    )
jax.export.register_pytree_node_serialization(
    IntegerGroups,
    serialized_name="bipolar_jax.IntegerGroups",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
    from_children=lambda _, children: IntegerGroups(*children),
)
