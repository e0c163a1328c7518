"""How a model is smoothed."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

Algorithm = Literal["smoothquant", "awq"]


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """The factors s by which inputs are divided and rows of weights multiplied.

    Attributes:
      algorithm: "smoothquant", max|x|^alpha / max|w|^(1 - alpha) of each input (arXiv 2211.10438), makes activations of
        few bits easier to quantize; "awq", mean|x|^alpha with the alpha of least output error (arXiv 2306.00978),
        spends the precision of weights where activations are large.
      alpha: of "smoothquant", 0 to 1: how much of the activations' outliers moves into weights.
      steps: of "awq": the number of alphas from 0 to 1 that are tried.

    Raises:
      ValueError: a field with another value than the above.
    """

    algorithm: Algorithm = "awq"
    alpha: float = 0.5
    steps: int = 20

    def __post_init__(self):
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(f"algorithm must be one of {', '.join(get_args(Algorithm))}, got {self.algorithm!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha!r}")
        if type(self.steps) is not int or self.steps < 2:
            raise ValueError(f"steps must be an integer of at least 2, got {self.steps!r}")
