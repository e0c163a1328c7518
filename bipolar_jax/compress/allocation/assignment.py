"""The assignment of options to the sites of layers that loses least under a budget.

Layers form runs, within which every site has the same option, because layers of a run are one stack. Losses and costs
add up. The best assignment of at most R runs follows from dynamic programming over where the last run begins and how
much of the budget is spent: a multiple-choice knapsack (Sinha and Zoltners 1979, doi 10.1287/opre.27.3.503) for each
run, and a segmentation of the layers (Bellman 1961, doi 10.1145/366573.366611) above it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, Num

# Steps that a budget is counted in, if costs are no integers.
STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Options of all sites.

    Attributes:
      choices: index of the option of every layer and site.
      loss, cost: sums over all layers and sites.
    """

    choices: Int[np.ndarray, "layers sites"]
    loss: float
    cost: float

    @property
    def runs(self) -> tuple[range, ...]:
        """Runs of layers with equal choices."""
        differ = np.any(self.choices[1:] != self.choices[:-1], axis=1)
        starts = [0, *(np.flatnonzero(differ) + 1).tolist(), len(self.choices)]
        return tuple(range(start, end) for start, end in itertools.pairwise(starts))


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The best assignments of all costs up to a budget.

    Attributes:
      assignments: by rising cost; each loses less than those before it.
    """

    assignments: tuple[Assignment, ...]

    def within(self, budget: float) -> Assignment:
        """The best assignment that costs at most the budget. Raises ValueError if there is none."""
        affordable = [each for each in self.assignments if each.cost <= budget * (1 + 1e-9)]
        if not affordable:
            raise ValueError(
                f"a budget of {budget:.6g} is below the cheapest assignment, which costs {self.assignments[0].cost:.6g}"
            )
        return affordable[-1]


def frontier(
    losses: Float[np.ndarray, "layers sites options"],
    costs: Num[np.ndarray, "layers sites options"],
    budget: float,
    runs: int,
    steps: int = STEPS,
) -> Frontier:
    """The best assignments up to a budget.

    The cost of a run is rounded up to a step of the budget, so that an assignment of R runs may stay R steps below what
    it could spend. With integer costs and as many steps as the budget nothing is rounded.

    Args:
      losses: of each option of each site.
      costs: likewise, positive; floats or integers.
      budget: largest cost of all layers together.
      runs: most runs of layers with equal options.
      steps: parts of the budget.

    Raises:
      ValueError: losses that are not finite, costs that are not positive, a budget that no assignment keeps, or no
        runs.
    """
    losses, costs = (np.asarray(each, np.float64) for each in (losses, costs))
    if losses.ndim != 3 or losses.shape != costs.shape or 0 in losses.shape:
        raise ValueError(f"losses and costs must be [layers, sites, options], got {losses.shape} and {costs.shape}")
    if not np.isfinite(losses).all() or not (np.isfinite(costs).all() and (costs > 0).all()):
        raise ValueError("losses must be finite, and costs positive")
    if runs < 1 or not budget > 0:
        raise ValueError(f"needs at least 1 run and a positive budget, got {runs} runs and a budget of {budget}")
    layers = len(losses)
    segments = _Segments(losses, costs, budget, steps)
    best = [np.full((layers + 1, steps + 1), np.inf) for _ in range(min(runs, layers) + 1)]
    best[0][0, 0] = 0
    came_from = [np.full((layers + 1, steps + 1, 2), -1, np.int32) for _ in best]
    for count in range(1, len(best)):
        for end in range(count, layers + 1):
            target, origin = best[count][end], came_from[count][end]
            for start in range(count - 1, end):
                source = best[count - 1][start]
                if not np.isfinite(source).any():
                    continue
                for index, (spent, loss) in enumerate(segments.points(start, end)):
                    candidates = source[: len(source) - spent] + loss
                    better = np.flatnonzero(candidates < target[spent:])
                    target[spent + better] = candidates[better]
                    origin[spent + better] = start, index
    found, least = [], np.inf
    for spent in range(steps + 1):
        count = int(np.argmin([each[layers, spent] for each in best]))
        if best[count][layers, spent] < least:
            least = best[count][layers, spent]
            found.append(_assignment(losses, costs, segments.traced(came_from, count, spent)))
    if not found:
        raise ValueError(f"no assignment costs as little as {budget:.6g}: the cheapest is {costs.min(-1).sum():.6g}")
    kept = _pareto(*(np.array([getattr(each, name) for each in found]) for name in ("cost", "loss")), budget)
    return Frontier(tuple(found[index] for index in kept))


class _Segments:
    """Choices of all sites for a run of layers: those of which no other loses less at no higher cost."""

    def __init__(self, losses, costs, budget: float, steps: int):
        start = np.zeros((1, *losses.shape[1:]))
        self._losses = np.concatenate([start, np.cumsum(losses, axis=0)])
        self._costs = np.concatenate([start, np.cumsum(costs, axis=0)])
        self._unit, self._steps = budget / steps, steps
        self._found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def points(self, start: int, end: int) -> Iterator[tuple[int, float]]:
        """Steps of the budget and loss of each choice for the layers from start up to end."""
        spent, losses, _ = self._choices(start, end)
        return zip(spent.tolist(), losses.tolist(), strict=True)

    def _choices(self, start: int, end: int):
        if (start, end) not in self._found:
            loss, cost = (each[end] - each[start] for each in (self._losses, self._costs))
            sums, paid = np.zeros(1), np.zeros(1)
            choices = np.zeros((1, 0), np.int32)
            for site in range(len(loss)):
                options = np.arange(loss.shape[1], dtype=np.int32)
                sums = (sums[:, None] + loss[site]).reshape(-1)
                paid = (paid[:, None] + cost[site]).reshape(-1)
                choices = np.concatenate([choices.repeat(len(options), 0), np.tile(options, len(choices))[:, None]], 1)
                kept = _pareto(paid, sums, self._unit * self._steps)
                sums, paid, choices = sums[kept], paid[kept], choices[kept]
            spent = np.ceil(paid / self._unit - 1e-9).astype(np.int64)
            self._found[start, end] = spent, sums, choices
        return self._found[start, end]

    def traced(self, came_from, count: int, spent: int) -> np.ndarray:
        """The choices that lead to so many runs of all layers and so many steps spent."""
        end, parts = len(self._losses) - 1, []
        while end:
            start, index = came_from[count][end, spent]
            steps, _, choices = self._choices(start, end)
            parts.append(np.broadcast_to(choices[index], (end - start, choices.shape[1])))
            spent, end, count = spent - steps[index], int(start), count - 1
        return np.concatenate(parts[::-1])


def _pareto(costs: np.ndarray, losses: np.ndarray, budget: float) -> np.ndarray:
    """Indices of the points within the budget that lose less than all that cost as much or less, by rising cost."""
    order = np.lexsort((losses, costs))
    order = order[costs[order] <= budget * (1 + 1e-12)]
    least = np.minimum.accumulate(losses[order])
    return order[np.concatenate([[True], losses[order][1:] < least[:-1]])[: len(order)]]


def _assignment(losses, costs, choices: np.ndarray) -> Assignment:
    def total(numbers):
        return float(np.take_along_axis(numbers, choices[..., None], axis=2).sum())

    return Assignment(choices, total(losses), total(costs))
