"""Packed arrays in the formats of Flax, Orbax and `jax.export`: registered on import."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import jax.export
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray

# In the order of the pytree's auxiliary data.
_STATIC = tuple(field.name for field in dataclasses.fields(BipolarArray) if field.metadata.get("static"))
_LEAVES = tuple(field.name for field in dataclasses.fields(BipolarArray) if field.name not in _STATIC)


def restore_packed(state: nnx.State, pure_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The pure dict of a state, as it was before Orbax wrote it: packed arrays in place of dicts of their leaves.

    Orbax restores without a target the leaves of every pytree as dicts, and `nnx.replace_by_pure_dict` takes values:

        restored = checkpointer.restore(path)
        nnx.replace_by_pure_dict(state, bj.nn.restore_packed(state, restored))

    A restore with `nnx.to_pure_dict(state)` as its target needs no more than Flax's recipe.

    Args:
      state: the state of a model with packed layers, also an abstract one; it is not changed.
      pure_dict: what Orbax restored; the keys may be strings for integers.

    Raises:
      ValueError: a packed array with leaves missing or in excess, or of other shapes or dtypes than in the state.
    """
    flat = flatten_dict(dict(pure_dict))
    for keys, variable in nnx.to_flat_state(state):
        packed = variable.get_value()
        if isinstance(packed, BipolarArray):
            prefix = tuple(map(str, keys))
            found = {path: value for path, value in flat.items() if tuple(map(str, path[:-1])) == prefix}
            flat = {path: value for path, value in flat.items() if path not in found}
            leaves = {path[-1]: value for path, value in found.items()}
            flat[keys] = _with_leaves(packed, leaves, "/".join(prefix))
    return unflatten_dict(flat)


def _with_leaves(target: BipolarArray, leaves: Mapping[str, Any], name: str) -> BipolarArray:
    """The target with other leaves of the same shapes and dtypes; absent offsets may be None or missing."""
    leaves = {key: leaf for key, leaf in leaves.items() if leaf is not None}
    expected = {key: getattr(target, key) for key in _LEAVES if getattr(target, key) is not None}
    found, wanted = (
        {key: f"{leaf.dtype}{list(leaf.shape)}" for key, leaf in sorted(each.items())} for each in (leaves, expected)
    )
    if found != wanted:
        raise ValueError(f"{name or 'the packed array'} has the leaves {found}, but its target {wanted}")
    return dataclasses.replace(target, **leaves)


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
    return {key: getattr(array, key) for key in _LEAVES} | _static_fields(array)


def _from_state_dict(target: BipolarArray, state: Mapping[str, Any]) -> BipolarArray:
    static = _static_fields(target)
    found = {key: state.get(key) for key in static}
    if found != static:
        raise ValueError(f"the packed array has {found}, but its target {static}")
    return _with_leaves(target, {key: value for key, value in state.items() if key not in static}, "")


def _serialize_static(values: tuple) -> bytes:
    fields = dict(zip(_STATIC, values, strict=True))
    number_format = fields.pop("format")
    return json.dumps({"bits": number_format.bits, "ternary": number_format.ternary, **fields}).encode()


def _deserialize_static(data: bytes) -> tuple:
    fields = json.loads(data)
    fields["format"] = BipolarFormat(fields.pop("bits"), ternary=fields.pop("ternary"))
    return tuple(fields[name] for name in _STATIC)


def _from_children(static: tuple, children: tuple) -> BipolarArray:
    return BipolarArray(**dict(zip(_LEAVES, children, strict=True)), **dict(zip(_STATIC, static, strict=True)))


flax.serialization.register_serialization_state(BipolarArray, _to_state_dict, _from_state_dict)
jax.export.register_pytree_node_serialization(
    BipolarArray,
    serialized_name="bipolar_jax.BipolarArray",
    serialize_auxdata=_serialize_static,
    deserialize_auxdata=_deserialize_static,
    from_children=_from_children,
)
