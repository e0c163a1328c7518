"""Finds the layers of an NNX model by path, and replaces them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx


@dataclasses.dataclass(frozen=True)
class LayerReference:
    """A reference from a module or container to a layer.

    Attributes:
      path: attribute names and indices from the model to the layer, joined by "/".
      parent: the module or container that holds the layer.
      key: the layer's attribute name, index or key in the parent.
      layer: the layer.
    """

    path: str
    parent: Any
    key: Any
    layer: nnx.Module

    def replace(self, layer: nnx.Module) -> None:
        """Makes the parent refer to another layer. Raises ValueError if the parent is a tuple."""
        if isinstance(self.parent, tuple):
            raise ValueError(f"layer {self.path} is in a tuple, where it cannot be replaced: use an nnx.List instead")
        if isinstance(self.parent, nnx.List | list | dict):
            self.parent[self.key] = layer
        else:
            setattr(self.parent, self.key, layer)


def layer_references(model: Any, types: tuple[type, ...]) -> list[LayerReference]:
    """All references to layers whose class is one of `types`; tied layers have several references."""
    return [reference for reference in _walk(model, "", set(), types) if type(reference.layer) in types]


def first_references(references: Sequence[LayerReference]) -> dict[int, LayerReference]:
    """The first reference to each layer, by the id of the layer; a tied layer goes by its first path."""
    first: dict[int, LayerReference] = {}
    for reference in references:
        first.setdefault(id(reference.layer), reference)
    return first


def other_layers(model: Any, types: tuple[type, ...]) -> dict[str, str]:
    """Path and class name of every other module that has an `nnx.Param` of its own."""
    return {
        reference.path: type(reference.layer).__name__
        for reference in _walk(model, "", set(), types)
        if type(reference.layer) not in types
        and any(isinstance(value, nnx.Param) for value in vars(reference.layer).values())
    }


def _walk(node: Any, prefix: str, seen: set[int], types: tuple[type, ...]) -> Iterator[LayerReference]:
    """References to all modules below a node.

    Each node is entered once, because modules may refer to each other. Layers of the given types
    are not entered, and are yielded for every reference to them.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    for key, child in _children(node):
        path = f"{prefix}{key}"
        if isinstance(child, nnx.Module):
            yield LayerReference(path, node, key, child)
        if type(child) not in types:
            yield from _walk(child, f"{path}/", seen, types)


def _children(node: Any) -> list[tuple[Any, Any]]:
    """(key, child) pairs of a module or container; [] for anything else."""
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, nnx.Module):
        return [(name, child) for name, child in vars(node).items() if not name.startswith("_pytree__")]
    return list(node.items()) if isinstance(node, dict) else []
