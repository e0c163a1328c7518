"""How one architecture is stored in a Hugging Face directory: its config's fields and its tensors' names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Shaped

from bipolar_jax.models.loaders.json_fields import Fields

# Query, key and value, in the order in which a fused tensor has them.
_FUSED = 3


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where a stored tensor, or some of its rows, go. Ordered as the parameters are.

    Attributes:
      path: of the parameter in the Transformer, joined by "/".
      layer: -1 outside the layers.
      name: of the stored tensor.
      first_row: rows before it are left out.
      fused: which of query, key and value to take of rows laid out [heads, 3, head_dim]; -1 takes all rows.
    """

    path: str
    layer: int
    name: str
    first_row: int = 0
    fused: int = -1

    def shape(self, stored: tuple[int, ...], num_heads: int) -> tuple[int, ...]:
        """Shape in our orientation: kernels are stored [out, in], ours are [in, out].

        Raises:
          ValueError: rows that `num_heads` heads cannot share as query, key and value.
        """
        if self.fused >= 0:
            if not stored or stored[0] % (_FUSED * num_heads):
                raise ValueError(
                    f"tensor {self.name!r} has shape {stored}, its rows are no query, key and value of "
                    f"{num_heads} heads: the file's config and its weights disagree"
                )
            stored = (stored[0] // _FUSED, *stored[1:])
        if self.first_row and stored:
            stored = (max(stored[0] - self.first_row, 0), *stored[1:])
        return stored[::-1] if self.path.endswith("/kernel") else stored

    def cut(self, stored: Shaped[np.ndarray, "rows *rest"], num_heads: int) -> Shaped[np.ndarray, "*ours"]:
        """The part, in our orientation."""
        if self.fused >= 0:
            by_head = stored.reshape(num_heads, _FUSED, -1, *stored.shape[1:])
            stored = by_head[:, self.fused].reshape(-1, *stored.shape[1:])
        if self.first_row:
            stored = stored[self.first_row :]
        return stored.T if self.path.endswith("/kernel") else stored


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the loader knows of an architecture. Modules are named as a file's "weight" and "bias" belong to them.

    Attributes:
      translate: from config.json to fields of a TransformerConfig, token ids left out; raises
        ValueError for what would load and then compute something else.
      prefix: begins every name but the head's, or none: that of the model without its head.
      layers: begins the names in a layer, before the layer's number.
      top: modules outside the layers -> modules of the Transformer.
      in_layer: modules in a layer -> modules of a DecoderLayer; three share a fused tensor.
      first_rows: rows at the start of a module's weight that are never used.
      ignored: ends of names that say nothing new.
    """

    translate: Callable[[Fields], dict[str, Any]]
    prefix: str
    layers: str
    top: dict[str, str]
    in_layer: dict[str, str | tuple[str, str, str]]
    first_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def places(self, name: str, tied: bool) -> list[Place]:
        """Where a stored tensor goes; nowhere, if it is ignored or a copy of tied embeddings.

        Raises:
          ValueError: the architecture has no such tensor.
        """
        module, _, kind = name.removeprefix(self.prefix).rpartition(".")
        if name.endswith(self.ignored) or (tied and name == "lm_head.weight"):
            return []
        match = re.fullmatch(rf"{re.escape(self.layers)}(\d{{1,9}})\.(.+)", module)
        layer, ours = (int(match[1]), self.in_layer.get(match[2])) if match else (-1, self.top.get(module))
        if ours is None or kind not in ("weight", "bias"):
            raise ValueError(f"unexpected tensor {name!r}: no supported model of this type has one")
        start = "layers/" if match else ""
        if isinstance(ours, str):
            return [Place(f"{start}{ours}/{_variable(ours, kind)}", layer, name, self.first_rows.get(module, 0))]
        return [
            Place(f"{start}{one}/{_variable(one, kind)}", layer, name, fused=index) for index, one in enumerate(ours)
        ]


def _variable(module: str, kind: str) -> str:
    """Our name for a module's weight or bias."""
    if kind == "bias":
        return "bias"
    if module.endswith("norm"):
        return "scale"
    return "embedding" if module in ("embed", "positions") else "kernel"
