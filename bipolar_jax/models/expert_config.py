"""What a model's config says of experts: feed-forward blocks of which every token runs a few."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a layer, as Mixtral (arXiv 2401.04088) and Qwen3-MoE (arXiv 2505.09388) have them.

    A router, a float product, scores all experts; a softmax makes weights of the scores. The experts with the largest
    weights run, and their outputs are summed with these weights.

    Attributes:
      count: experts of a layer.
      per_token: experts that run for a token.
      ffn_size: inner width of an expert.
      normalize: whether the weights of the chosen experts are divided by their sum.
      dense_layers: layers whose feed-forward block is dense, of `TransformerConfig.ffn_size`; ascending.

    Raises:
      ValueError: sizes that are no positive integers, more experts for a token than there are, or such layers.
    """

    count: int
    per_token: int
    ffn_size: int
    normalize: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("count", "per_token", "ffn_size"):
            value = _integer(name, getattr(self, name))
            if not 1 <= value < 2**31:
                raise ValueError(f"experts.{name} must be from 1 to {2**31 - 1}, got {value}")
        if self.per_token > self.count:
            raise ValueError(f"a token cannot run {self.per_token} of {self.count} experts: lower experts.per_token")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"experts.normalize must be True or False, got {self.normalize!r:.40}")
        if not isinstance(self.dense_layers, tuple | list):
            raise ValueError(f"experts.dense_layers must be indices of layers, got {self.dense_layers!r:.40}")
        layers = tuple(_integer("dense_layers", layer) for layer in self.dense_layers)
        object.__setattr__(self, "dense_layers", layers)
        if sorted({*layers}) != [*layers] or any(layer < 0 for layer in layers):
            raise ValueError(f"experts.dense_layers must be ascending indices of layers, got {layers!s:.60}")

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError unless the dense layers are some of so many, and not all of them."""
        if self.dense_layers and self.dense_layers[-1] >= num_layers:
            raise ValueError(
                f"experts.dense_layers must be indices of the {num_layers} layers, got {self.dense_layers!s:.60}"
            )
        if len(self.dense_layers) == num_layers:
            raise ValueError(f"all {num_layers} layers are dense: leave experts None")

    def runs(self, num_layers: int) -> tuple[range, ...]:
        """The runs of consecutive layers of so many that are alike: with experts, or dense."""
        dense = {*self.dense_layers}
        changes = {end for layer in dense for end in (layer, layer + 1) if (end in dense) != (end - 1 in dense)}
        starts = sorted({0, *(layer for layer in changes if 0 < layer < num_layers)})
        return tuple(range(*ends) for ends in itertools.pairwise([*starts, num_layers]))

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Inverse of `dataclasses.asdict`. Raises ValueError or TypeError for other fields."""
        if not isinstance(fields, dict):
            raise ValueError(f"experts is a {type(fields).__name__}, expected an object")
        return cls(**fields)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"experts.{name} must be an integer, got {value}")
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"experts.{name} must be an integer, got {value!r:.40}") from error
