"""Means over draws of calibration text, and differences of methods that are paired by draw and by window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# In place of a draw's name, for methods that use no text, such as rounding.
NO_DRAW = "none"
# Losses of every window, by draw.
Draws = Mapping[str, Sequence[float]]


class Mean(NamedTuple):
    """A mean and its standard error, None where there is one number."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Mean:
        """Of independent numbers."""
        numbers = np.asarray(numbers, np.float64)
        error = float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else None
        return cls(float(numbers.mean()), error)


def mean_perplexity(draws: Draws) -> Mean:
    """The mean over draws of exp(mean loss)."""
    return Mean.of([math.exp(np.mean(losses)) for losses in draws.values()])


def mean_difference(draws: Draws, against: Draws) -> Mean:
    """The mean over draws of the difference in loss, in nats a token, on the same windows.

    Draws are paired by their names, `NO_DRAW` with all. With one pair the standard error is that over its windows.

    Raises:
      ValueError: no draw in common, or other numbers of windows.
    """
    names = [(name, name) for name in draws if name in against]
    if NO_DRAW in draws or NO_DRAW in against:
        names = [(a, b) for a in draws for b in against]
    if not names:
        raise ValueError(f"no draws in common: {', '.join(draws)} and {', '.join(against)}")
    pairs = [(np.asarray(draws[a], np.float64), np.asarray(against[b], np.float64)) for a, b in names]
    if any(one.shape != other.shape for one, other in pairs):
        raise ValueError("methods have losses of other numbers of windows: score them on the same text")
    differences = [one - other for one, other in pairs]
    if len(differences) == 1:
        return Mean.of(differences[0])
    return Mean.of([each.mean() for each in differences])
