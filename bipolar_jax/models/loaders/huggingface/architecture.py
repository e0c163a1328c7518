"""Maps a Hugging Face architecture to the Transformer: config fields, and tensor names to parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Shaped

from bipolar_jax.models.loaders.huggingface.json_fields import Fields

HEAD = "lm_head.weight"  # the output layer, in every architecture
_FUSED = 3  # query, key and value, in the order of a fused tensor


@dataclasses.dataclass(frozen=True, order=True)
class Target:
    """The parameter that a stored tensor, or some of its rows, is loaded into. Sorts in the order of parameters.

    Attributes:
      path: path of the parameter in the Transformer, joined by "/".
      layer: decoder layer, or -1 outside the layers.
      name: name of the stored tensor.
      first_row: first row to load.
      fused: index of query, key or value in rows laid out as [heads, 3, head_dim]; -1 loads all rows.
    """

    path: str
    layer: int
    name: str
    first_row: int = 0
    fused: int = -1

    def shape(self, stored: tuple[int, ...], num_heads: int) -> tuple[int, ...]:
        """Shape of what is loaded, in the parameter's orientation, for a stored shape.

        Raises:
          ValueError: rows of a fused tensor that do not divide into query, key and value of `num_heads` heads.
        """
        if self.fused >= 0:
            if not stored or stored[0] % (_FUSED * num_heads):
                raise ValueError(
                    f"tensor {self.name!r} has shape {stored}, its rows do not divide into query, key "
                    f"and value of {num_heads} heads: the file's config and its weights disagree"
                )
            stored = (stored[0] // _FUSED, *stored[1:])
        if self.first_row and stored:
            stored = (max(stored[0] - self.first_row, 0), *stored[1:])
        return stored[::-1] if self.path.endswith("/kernel") else stored

    def row_ranges(self, rows: int, num_heads: int) -> list[tuple[int, int, int]]:
        """The rows to load as (first stored row, end, first of our rows), if `rows` are stored."""
        if self.fused < 0:
            return [(self.first_row, rows, 0)]
        size = rows // (_FUSED * num_heads)
        starts = [(_FUSED * head + self.fused) * size for head in range(num_heads)]
        return [(start, start + size, head * size) for head, start in enumerate(starts)]

    def as_stored(self, parameter: Shaped[np.ndarray, "*ours"]) -> Shaped[np.ndarray, "*stored"]:
        """A view of the parameter in the stored orientation: kernels are stored as [out, in], ours are [in, out]."""
        return parameter.T if self.path.endswith("/kernel") else parameter


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The stored form of an architecture. A module's tensors are named MODULE.weight and MODULE.bias.

    Attributes:
      translate: maps config.json to fields of TransformerConfig, except token ids; raises ValueError
        for features that the Transformer does not compute.
      prefix: prefix of tensor names; optional, since files of the model without its head lack it.
      layers: prefix of names in a layer, before the layer's number.
      top: modules outside the layers -> modules of the Transformer.
      in_layer: modules in a layer -> modules of a DecoderLayer, or three of them for a fused tensor.
      first_rows: module -> number of unused rows at the start of its weight.
      ignored: suffixes of tensor names to skip.
    """

    translate: Callable[[Fields], dict[str, Any]]
    prefix: str
    layers: str
    top: dict[str, str]
    in_layer: dict[str, str | tuple[str, str, str]]
    first_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def targets(self, name: str, tied: bool) -> list[Target]:
        """The parameters that a stored tensor is loaded into; none if it is ignored or a copy of tied embeddings.

        Args:
          name: name of the tensor.
          tied: whether the embeddings are tied.

        Raises:
          ValueError: the architecture has no such tensor.
        """
        module, _, kind = name.removeprefix(self.prefix).rpartition(".")
        if name.endswith(self.ignored) or (tied and name == HEAD):
            return []
        match = re.fullmatch(rf"{re.escape(self.layers)}(\d{{1,9}})\.(.+)", module)
        layer, ours = (int(match[1]), self.in_layer.get(match[2])) if match else (-1, self.top.get(module))
        if ours is None or kind not in ("weight", "bias"):
            raise ValueError(f"unexpected tensor {name!r:.200}: no supported model of this type has one")
        start = "layers/" if match else ""
        if isinstance(ours, str):
            return [Target(f"{start}{ours}/{_variable(ours, kind)}", layer, name, self.first_rows.get(module, 0))]
        return [
            Target(f"{start}{module}/{_variable(module, kind)}", layer, name, fused=index)
            for index, module in enumerate(ours)
        ]


def _variable(module: str, kind: str) -> str:
    """Name of a module's weight or bias in the Transformer."""
    if kind == "bias":
        return "bias"
    if module.endswith("norm"):
        return "scale"
    return "embedding" if module in ("embed", "positions") else "kernel"
