"""The best assignment under a budget, against all assignments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bipolar_jax.compress.allocation import Assignment, frontier, rules_of
from bipolar_jax.nn.compressible import Sites

LAYERS, SITES, OPTIONS = 4, 2, 3


def numbers(seed: int):
    rng = np.random.default_rng(seed)
    losses = rng.exponential(size=(LAYERS, SITES, OPTIONS))
    return losses, rng.integers(1, 9, (LAYERS, SITES, OPTIONS))


def brute_force(losses, costs, budget: int, runs: int) -> float:
    """The least loss of all assignments, or Inf."""
    least = np.inf
    for choices in itertools.product(range(OPTIONS), repeat=LAYERS * SITES):
        found = np.reshape(choices, (LAYERS, SITES, 1))
        changes = np.any(found[1:] != found[:-1], axis=(1, 2)).sum()
        loss, cost = (np.take_along_axis(each, found, axis=2).sum() for each in (losses, costs))
        if changes < runs and cost <= budget:
            least = min(least, loss)
    return least


@pytest.mark.parametrize("runs", [1, 2, LAYERS])
def test_no_assignment_is_better(runs):
    losses, costs = numbers(runs)
    found = frontier(losses, costs, 40, runs, steps=40)
    for budget in (33, 36, 40):
        best = found.within(budget)
        assert best.loss == pytest.approx(brute_force(losses, costs, budget, runs))
        assert best.cost <= budget
        assert len(best.runs) <= runs
    ordered = [(each.cost, -each.loss) for each in found.assignments]
    assert ordered == sorted(ordered)


def test_rounded_costs_keep_the_budget():
    losses, costs = numbers(3)
    costs = costs * 0.37
    budget = 0.9 * costs.max(-1).sum()
    rough, fine = (frontier(losses, costs, budget, 2, steps).within(budget) for steps in (64, 4096))
    assert fine.loss <= rough.loss
    assert rough.cost <= budget
    assert fine.cost <= budget


def test_what_cannot_be_is_refused():
    losses, costs = numbers(0)
    with pytest.raises(ValueError, match="no assignment costs as little as 3"):
        frontier(losses, costs, 3, 4)
    with pytest.raises(ValueError, match="a budget of 1 is below the cheapest assignment"):
        frontier(losses, costs, 60, 4).within(1)
    with pytest.raises(ValueError, match="costs positive"):
        frontier(losses, 0 * costs, 60, 4)
    with pytest.raises(ValueError, match=r"must be \[layers, sites, options\]"):
        frontier(losses[0], costs, 60, 4)
    with pytest.raises(ValueError, match="at least 1 run"):
        frontier(losses, costs, 60, 0)


def test_an_assignment_as_rules():
    sites = [
        Sites(("attention/q_proj", "attention/k_proj"), to_stream=False),
        Sites(("ffn/down_proj",), to_stream=True),
    ]
    assignment = Assignment(np.array([[0, 0], [0, 0], [0, 1]]), 0.0, 0.0)
    assert rules_of(assignment, sites, ["W3A8", "W5A8"]) == [
        ("^layers/0-1/(attention/q_proj|attention/k_proj|ffn/down_proj)$", "W3A8"),
        ("^layers/2/(attention/q_proj|attention/k_proj)$", "W3A8"),
        ("^layers/2/(ffn/down_proj)$", "W5A8"),
    ]
