"""The layers of an NNX model by path, and how to put others in their places."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer stands: attribute names and indices joined by "/", and the last step of that way."""

    path: str
    parent: Any
    key: Any
    layer: nnx.Module

    def put(self, layer: nnx.Module) -> None:
        """Puts another layer in this place. Raises ValueError if the parent is a tuple."""
        if isinstance(self.parent, tuple):
            raise ValueError(f"layer {self.path} is in a tuple, where it cannot be replaced: use an nnx.List instead")
        if isinstance(self.parent, nnx.List | list | dict):
            self.parent[self.key] = layer
        else:
            setattr(self.parent, self.key, layer)


def places_of(model: Any, types: tuple[type, ...]) -> list[Place]:
    """Every place of a layer that is exactly of one of the types; tied layers have several."""
    return [place for place in _walk(model, "", set(), types) if type(place.layer) in types]


def other_layers(model: Any, types: tuple[type, ...]) -> dict[str, str]:
    """Path and class name of every module with parameters of its own that is of none of the types."""
    return {
        place.path: type(place.layer).__name__
        for place in _walk(model, "", set(), types)
        if type(place.layer) not in types and any(isinstance(value, nnx.Param) for value in vars(place.layer).values())
    }


def _walk(node: Any, prefix: str, seen: set[int], types: tuple[type, ...]) -> Iterator[Place]:
    """Every module below a node; those of the types are not entered, and come once for each of their paths."""
    if id(node) in seen:  # modules may refer to each other
        return
    seen.add(id(node))
    for key, child in _children(node):
        path = f"{prefix}{key}"
        if isinstance(child, nnx.Module):
            yield Place(path, node, key, child)
        if type(child) not in types:
            yield from _walk(child, f"{path}/", seen, types)


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, nnx.Module):
        return [(name, child) for name, child in vars(node).items() if not name.startswith("_pytree__")]
    return list(node.items()) if isinstance(node, dict) else []
