"""Finds the layers of an NNX model by path, and replaces them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Attributes that norms and biases have; everything else with two axes or more counts as weights.
NOT_WEIGHTS = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class LayerReference:
    """A reference from a module or container to a layer.

    Attributes:
      path: attribute names and indices from the model to the layer, joined by "/"; "" is the model.
      parent: the module or container that holds the layer.
      key: the layer's attribute name, index or key in the parent.
      layer: the layer, a module or another `nnx.Pytree`.
    """

    path: str
    parent: Any
    key: Any
    layer: nnx.Pytree

    def replace(self, layer: nnx.Module) -> None:
        """Makes the parent refer to another layer. Raises ValueError if the parent cannot be changed, as a tuple."""
        if isinstance(self.parent, nnx.List | list | dict):
            self.parent[self.key] = layer
        elif isinstance(self.parent, nnx.Pytree):
            setattr(self.parent, self.key, layer)
        else:
            raise ValueError(
                f"layer {self.path} is in a {type(self.parent).__name__}, where it cannot be replaced: "
                "use an nnx.List, an nnx.Dict or a module instead"
            )


def layer_references(model: Any, types: tuple[type, ...]) -> list[LayerReference]:
    """All references to layers whose class is one of `types`; tied layers have several references."""
    return [reference for reference in _walk(model, "", set(), types) if type(reference.layer) in types]


def first_references(references: Sequence[LayerReference]) -> dict[int, LayerReference]:
    """The first reference to each layer, by the id of the layer; a tied layer goes by its first path."""
    first: dict[int, LayerReference] = {}
    for reference in references:
        first.setdefault(id(reference.layer), reference)
    return first


def other_layers(model: Any, types: tuple[type, ...]) -> list[LayerReference]:
    """References to every other module or container that has an `nnx.Param` of its own; the model itself is ""."""
    references = [LayerReference("", None, None, model), *_walk(model, "", set(), types)]
    others = [reference for reference in references if type(reference.layer) not in types]
    first = first_references(others).values()
    return [reference for reference in first if own_parameters(reference.layer)]


def class_name(layer: nnx.Pytree, types: tuple[type, ...] = ()) -> str:
    """The class of a layer for messages; a subclass of one of `types` is called that."""
    base = next((each for each in types if isinstance(layer, each) and type(layer) is not each), None)
    name = type(layer).__name__
    return name if base is None else f"{name}, a subclass of nnx.{base.__name__}"


def own_parameters(node: Any) -> dict[str, nnx.Param]:
    """The float `nnx.Param`s that a module or container holds itself, also in containers that are no modules."""
    found = {}
    for key, child in _children(node):
        if isinstance(child, nnx.Param):
            if jnp.issubdtype(getattr(child.get_value(), "dtype", None), jnp.floating):
                found[str(key)] = child
        elif not isinstance(child, nnx.Pytree | nnx.Variable):
            found |= {f"{key}/{name}": variable for name, variable in own_parameters(child).items()}
    return found


def own_weights(node: Any) -> dict[str, nnx.Param]:
    """The own parameters of a layer that could be low-bit in principle: no biases, and no scales of norms."""
    return {
        name: variable
        for name, variable in own_parameters(node).items()
        if name.split("/")[-1] not in NOT_WEIGHTS and variable.get_value().ndim >= 2
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
        if isinstance(child, nnx.Pytree):
            yield LayerReference(path, node, key, child)
        if type(child) not in types:
            yield from _walk(child, f"{path}/", seen, types)


def _children(node: Any) -> list[tuple[Any, Any]]:
    """(key, child) pairs of a module, a container or another pytree; [] for anything else."""
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, nnx.Pytree):
        return [(name, child) for name, child in vars(node).items() if not name.startswith("_pytree__")]
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, nnx.Variable | jax.Array):
        return []
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return [(jax.tree_util.keystr(path, simple=True), child) for path, child in children if path]
