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
from bipolar_jax.packing import BipolarArray, BipolarNumbers, UnpackedArray

# In the order of the pytree's auxiliary data.
_STATIC = tuple(field.name for field in dataclasses.fields(BipolarArray) if field.metadata.get("static"))
_LEAVES = tuple(field.name for field in dataclasses.fields(BipolarArray) if field.name not in _STATIC)


def from_list(target: BipolarNumbers, values: Sequence[Any]) -> BipolarNumbers:
    """The packed array whose leaves Orbax restored, without a target, as a list.

    Args:
      target: an array of the same structure, also an abstract one.
      values: its leaves in order, None for those that it does not have; integer groups as a dict.

    Raises:
      ValueError: leaves missing or in excess, or of other shapes or dtypes than the target's.
    """
    names = [field.name for field in dataclasses.fields(target) if field.name not in _STATIC]
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
    leaves = {key: getattr(array, key) for key in _LEAVES}
    if array.groups is not None:
        leaves["groups"] = {"scale": array.groups.scale, "offset": array.groups.offset}
    return leaves | _static_fields(array)


def _from_state_dict(target: BipolarArray, state: Mapping[str, Any]) -> BipolarArray:
    static = _static_fields(target)
    found = {key: state.get(key) for key in static}
    if found != static:
        raise ValueError(f"the packed array has {found}, but its target {static}")
    return _with_leaves(target, flatten_dict({key: value for key, value in state.items() if key not in static}))


def _serialize_static(values: tuple) -> bytes:
    fields = dict(zip(_STATIC, values, strict=True))
    number_format = fields.pop("format")
    return json.dumps({"bits": number_format.bits, "ternary": number_format.ternary, **fields}).encode()


def _deserialize_static(data: bytes) -> tuple:
    fields = json.loads(data)
    fields["format"] = BipolarFormat(fields.pop("bits"), ternary=fields.pop("ternary"))
    return tuple(fields[name] for name in _STATIC)


def _from_children(kind: type[BipolarNumbers], static: tuple, children: tuple) -> BipolarNumbers:
    leaves = (field.name for field in dataclasses.fields(kind) if field.name not in _STATIC)
    return kind(**dict(zip(leaves, children, strict=True)), **dict(zip(_STATIC, static, strict=True)))


flax.serialization.register_serialization_state(BipolarArray, _to_state_dict, _from_state_dict)
for _kind in (BipolarArray, UnpackedArray):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"bipolar_jax.{_kind.__name__}",
        serialize_auxdata=_serialize_static,
        deserialize_auxdata=_deserialize_static,
        from_children=functools.partial(_from_children, _kind),
    )
