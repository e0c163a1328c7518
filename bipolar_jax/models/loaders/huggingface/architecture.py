"""Maps a Hugging Face architecture to the Transformer: config fields, and tensor names to parameters."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.huggingface.json_fields import Fields

HEAD = "lm_head.weight"  # the output layer, in every architecture
IN_LAYERS = "layers/"  # start of the paths of parameters in a layer
_EXPERT = re.compile(r"\.(\d{1,9})\.")  # in the name of a module in a layer
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
      expert: of a tensor with all experts of a layer, [experts, rows, columns], the one whose rows are loaded; else -1.
      plus_one: whether 1 is added to the stored numbers.
    """

    path: str
    layer: int
    name: str
    first_row: int = 0
    fused: int = -1
    beside: tuple[str, ...] = ()
    plus_one: bool = False
    expert: int = -1

    def shape(self, stored: tuple[int, ...], config: TransformerConfig) -> tuple[int, ...]:
        """Shape of what is loaded, in the parameter's orientation, for a stored shape.

        Raises:
          ValueError: rows of a fused tensor that do not divide into its parts.
        """
        num_heads = config.num_heads
        if self.expert >= 0:
            if len(stored) != 3 or stored[0] != config.experts.count:
                raise ValueError(
                    f"tensor {self.name!r} has shape {stored}, not those of {config.experts.count} experts: the file's "
                    "config and its weights disagree"
                )
            stored = stored[1:]
        if self.beside:
            sizes = [_outputs(module, config) for module in self.beside]
            if not stored or stored[0] != sum(sizes):
                raise ValueError(
                    f"tensor {self.name!r} has shape {stored}, its rows are not the {sizes} of its parts: the file's "
                    "config and its weights disagree"
                )
            stored = (_outputs(self._module, config), *stored[1:])
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
        """The rows to load as (first stored row, end, first of our rows), if `rows` are stored, of an expert or all."""
        num_heads, first = config.num_heads, max(self.expert, 0) * rows
        if self.beside:
            before = self.beside[: self.beside.index(self._module)]
            start = first + sum(_outputs(module, config) for module in before)
            return [(start, start + _outputs(self._module, config), 0)]
        if self.expert >= 0:
            return [(first, first + rows, 0)]
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
        `SideBySide`. A "*" in both stands for the number of an expert.
      of_experts: tensors in a layer that hold all its experts, [experts, rows, columns] -> modules of an expert, whose
        rows lie side by side.
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
    of_experts: Mapping[str, tuple[str, ...]] = types.MappingProxyType({})

    def targets(self, name: str, tied: bool, num_experts: int = 0) -> Iterable[Target]:
        """The parameters that a stored tensor is loaded into; none if it is ignored or a copy of tied embeddings.

        Args:
          name: name of the tensor.
          tied: whether the embeddings are tied.
          num_experts: experts of a layer.

        Returns:
          A list; of a tensor with all experts of a layer an iterator, because a damaged config may state billions.

        Raises:
          ValueError: the architecture has no such tensor, or the model no experts.
        """
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        module, _, kind = name.removeprefix(prefix).rpartition(".")
        if name.endswith(self.ignored) or name.startswith(self.other_models) or (tied and name == HEAD):
            return []
        match = re.fullmatch(rf"{re.escape(self.layers)}(\d{{1,9}})\.(.+)", module)
        together = self.of_experts.get(f"{match[2]}.{kind}") if match else None
        if together is not None and num_experts:
            return self._of_experts(together, int(match[1]), name, num_experts)
        layer, ours = (int(match[1]), self._module_in_layer(match[2])) if match else (-1, self.top.get(module))
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

    def _module_in_layer(self, module: str) -> str | tuple[str, str, str] | SideBySide | None:
        """What a module in a layer is loaded into; None for an unknown one."""
        found = _EXPERT.search(module)
        if found is None:
            return self.in_layer.get(module)
        ours = self.in_layer.get(_EXPERT.sub(".*.", module, count=1))
        return None if ours is None else ours.replace("*", str(int(found[1])))

    def _of_experts(self, modules: tuple[str, ...], layer: int, name: str, num_experts: int) -> Iterator[Target]:
        """The parameters of all experts of a layer, whose `modules` lie side by side in one tensor."""
        for expert in range(num_experts):
            names = tuple(f"ffn/experts/{expert}/{module}" for module in modules)
            beside = names if len(names) > 1 else ()
            for own in names:
                yield Target(f"{IN_LAYERS}{own}/kernel", layer, name, beside=beside, expert=expert)


def _outputs(module: str, config: TransformerConfig) -> int:
    """Outputs of a module of a layer, such as "attention/q_proj"."""
    return config.experts.ffn_size if "/experts/" in module else config.outputs(module.rpartition("/")[2])


def _variable(module: str, kind: str) -> str:
    """Name of a module's weight or bias in the Transformer."""
    if kind == "bias":
        return "bias"
    if module.endswith("norm"):
        return "scale"
    return "embedding" if module in ("embed", "positions") else "kernel"
