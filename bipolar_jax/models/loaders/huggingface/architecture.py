"""Maps a Hugging Face architecture to the Transformer: config fields, and tensor names to parameters."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.huggingface.json_fields import Fields

HEAD = "lm_head.weight"  # the output layer, in every architecture
IN_LAYERS = "layers/"  # start of the paths of parameters in a layer
_FUSED = 3  # query, key and value, in the order of a fused tensor


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Modules whose outputs are rows of one stored tensor, those of the first module first."""

    modules: tuple[str, ...]


@dataclasses.dataclass(frozen=True, order=True)
class Target:
    """The parameter that a stored tensor, or some of its rows, is loaded into. Sorts in the order of parameters.

    Attributes:
      path: path of the parameter in the Transformer, joined by "/".
      layer: decoder layer, or -1 outside the layers.
      name: name of the stored tensor.
      first_row: first row to load.
      fused: index of query, key or value in rows laid out as [heads, 3, head_dim]; -1 loads all rows.
      beside: all modules that lie side by side in the tensor, this parameter's among them, see `SideBySide`.
      plus_one: whether 1 is added to the stored numbers.
    """

    path: str
    layer: int
    name: str
    first_row: int = 0
    fused: int = -1
    beside: tuple[str, ...] = ()
    plus_one: bool = False

    def shape(self, stored: tuple[int, ...], config: TransformerConfig) -> tuple[int, ...]:
        """Shape of what is loaded, in the parameter's orientation, for a stored shape.

        Raises:
          ValueError: rows of a fused tensor that do not divide into its parts.
        """
        num_heads = config.num_heads
        if self.beside:
            sizes = [config.outputs(_name(module)) for module in self.beside]
            if not stored or stored[0] != sum(sizes):
                raise ValueError(
                    f"tensor {self.name!r} has shape {stored}, its rows are not the {sizes} of its parts: the file's "
                    "config and its weights disagree"
                )
            stored = (config.outputs(_name(self._module)), *stored[1:])
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

    @property
    def _module(self) -> str:
        """The module of a parameter in a layer."""
        return self.path.removeprefix(IN_LAYERS).rpartition("/")[0]

    def row_ranges(self, rows: int, config: TransformerConfig) -> list[tuple[int, int, int]]:
        """The rows to load as (first stored row, end, first of our rows), if `rows` are stored."""
        num_heads = config.num_heads
        if self.beside:
            before = self.beside[: self.beside.index(self._module)]
            start = sum(config.outputs(_name(module)) for module in before)
            return [(start, start + config.outputs(_name(self._module)), 0)]
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
      prefixes: prefixes of tensor names, of which the first that fits is left out; optional, since files of the model
        without its head lack them.
      layers: prefix of names in a layer, before the layer's number.
      top: modules outside the layers -> modules of the Transformer.
      in_layer: modules in a layer -> modules of a DecoderLayer; three of them for a tensor whose heads alternate, or
        `SideBySide`.
      first_rows: module -> number of unused rows at the start of its weight.
      ignored: suffixes of tensor names to skip.
      gains_less_one: whether norms multiply by 1 plus the stored gain.
      defaults: values of absent fields of config.json, as transformers has them.
      text_config: field of config.json that holds the config of the text model, or None.
      other_models: prefixes of tensors of other models in the same folder, such as of images.
    """

    translate: Callable[[Fields], dict[str, Any]]
    prefixes: tuple[str, ...]
    layers: str
    top: dict[str, str]
    in_layer: dict[str, str | tuple[str, str, str] | SideBySide]
    first_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    gains_less_one: bool = False
    defaults: Mapping[str, Any] = types.MappingProxyType({})
    text_config: str | None = None
    other_models: tuple[str, ...] = ()

    def targets(self, name: str, tied: bool) -> list[Target]:
        """The parameters that a stored tensor is loaded into; none if it is ignored or a copy of tied embeddings.

        Args:
          name: name of the tensor.
          tied: whether the embeddings are tied.

        Raises:
          ValueError: the architecture has no such tensor.
        """
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        module, _, kind = name.removeprefix(prefix).rpartition(".")
        if name.endswith(self.ignored) or name.startswith(self.other_models) or (tied and name == HEAD):
            return []
        match = re.fullmatch(rf"{re.escape(self.layers)}(\d{{1,9}})\.(.+)", module)
        layer, ours = (int(match[1]), self.in_layer.get(match[2])) if match else (-1, self.top.get(module))
        if ours is None or kind not in ("weight", "bias"):
            raise ValueError(f"unexpected tensor {name!r:.200}: no supported model of this type has one")
        start = IN_LAYERS if match else ""
        if isinstance(ours, str):
            variable, first_row = _variable(ours, kind), self.first_rows.get(module, 0)
            plus_one = self.gains_less_one and variable == "scale"
            return [Target(f"{start}{ours}/{variable}", layer, name, first_row, plus_one=plus_one)]
        if isinstance(ours, SideBySide):
            paths = [f"{start}{module}/{_variable(module, kind)}" for module in ours.modules]
            return [Target(path, layer, name, beside=ours.modules) for path in paths]
        return [
            Target(f"{start}{module}/{_variable(module, kind)}", layer, name, fused=index)
            for index, module in enumerate(ours)
        ]


def _name(module: str) -> str:
    return module.rpartition("/")[2]


def _variable(module: str, kind: str) -> str:
    """Name of a module's weight or bias in the Transformer."""
    if kind == "bias":
        return "bias"
    if module.endswith("norm"):
        return "scale"
    return "embedding" if module in ("embed", "positions") else "kernel"
