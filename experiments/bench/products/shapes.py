"""Named shapes of matrix products: squares, and the linear layers of three language models."""

from __future__ import annotations

import dataclasses
import re

# (n, k) of the four products of one decoder layer; q, k and v are fused, and so are gate and up.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "llama2-7b": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "opt-6.7b": {"qkv": (12288, 4096), "o": (4096, 4096), "fc1": (16384, 4096), "fc2": (4096, 16384)},
    "bloom-7b1": {"qkv": (12288, 4096), "dense": (4096, 4096), "h_to_4h": (16384, 4096), "4h_to_h": (4096, 16384)},
}
TOKENS = (1024, 2048, 4096)

_SIZES = re.compile(r"(\d+)(?:x(\d+)x(\d+))?")
_LAYER = re.compile(r"(?P<model>[^/@]+)(?:/(?P<layer>[^@]+))?@(?P<tokens>\d+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """x [m, k] times w [k, n].

    Attributes:
      name: its notation in configs and results.
      m: rows of x.
      n: columns of w.
      k: contracted size.
    """

    name: str
    m: int
    n: int
    k: int

    @property
    def operations(self) -> int:
        """Multiplications plus additions of one product."""
        return 2 * self.m * self.n * self.k

    def __str__(self) -> str:
        sizes = f"{self.m}x{self.n}x{self.k}"
        return sizes if self.name == sizes else f"{self.name} ({sizes})"


SQUARES = tuple(
    Shape(f"{m}x{n}x{k}", m, n, k)
    for m, n, k in (*((size,) * 3 for size in (1024, 2048, 4096, 8192)), (8192, 8192, 16384))
)


def model_shapes(model: str, tokens: int) -> list[Shape]:
    """The four products of a model's decoder layer with m = tokens. Raises ValueError for an unknown model."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}: choose from {', '.join(MODELS)}")
    return [Shape(f"{model}/{layer}@{tokens}", tokens, n, k) for layer, (n, k) in MODELS[model].items()]


def parse_shapes(text: str) -> list[Shape]:
    """Reads a comma-separated list of shapes, without duplicates.

    Items: "4096" (a square), "8192x8192x16384" (m x n x k), "llama2-7b@2048" (a model's four products at 2048
    tokens), "llama2-7b/down@2048" (one of them), "squares", "all".

    Raises:
      ValueError: any other item.
    """
    shapes = {shape.name: shape for item in text.split(",") for shape in _parse_item(item.strip())}
    return list(shapes.values())


def _parse_item(item: str) -> list[Shape]:
    if item == "squares":
        return list(SQUARES)
    if item == "all":
        layers = [shape for model in MODELS for tokens in TOKENS for shape in model_shapes(model, tokens)]
        return [*SQUARES, *layers]
    if match := _SIZES.fullmatch(item):
        m, n, k = (int(size or match[1]) for size in match.groups())
        if 0 in (m, n, k):
            raise ValueError(f"shape {item!r} has a size of zero")
        return [Shape(f"{m}x{n}x{k}", m, n, k)]
    if match := _LAYER.fullmatch(item):
        shapes = model_shapes(match["model"], int(match["tokens"]))
        chosen = [shape for shape in shapes if match["layer"] in (None, shape.name.partition("/")[2].partition("@")[0])]
        if chosen:
            return chosen
        raise ValueError(
            f"{match['model']} has no layer {match['layer']!r}: it has {', '.join(MODELS[match['model']])}"
        )
    raise ValueError(
        f"shape {item!r} is not one of 4096, 8192x8192x16384, llama2-7b@2048, llama2-7b/down@2048, squares, all"
    )
