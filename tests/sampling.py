"""Which tests run by default, and which cases of a test with many parameters; `--exhaustive` runs all.

`@pytest.mark.sample(n)`: n of the cases, and one with `--fast`. `@pytest.mark.covered(by)`: none; `by` says which tests
cover it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def leave_out_unsampled(config: pytest.Config, items: list[pytest.Item], *, fast: bool = False) -> None:
    """Takes the cases beyond the sample of their test, or with `fast` beyond the first of it, from `items`."""
    tests: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            tests.setdefault((item.path, item.nodeid.split("[")[0]), []).append(item)
    left_out = {item for item in items if item.get_closest_marker("covered")}
    for cases in tests.values():
        size = 1 if fast else cases[0].get_closest_marker("sample").args[0]
        kept = sample([_values(case) for case in cases], size)
        left_out |= {case for i, case in enumerate(cases) if i not in kept}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _values(case: pytest.Item) -> dict[str, int]:
    """For every parameter a number of its value, the same in all cases that have that very object.

    `callspec.indices` will not do: where decorators are stacked, pytest numbers the cases, not the values.
    """
    return {name: id(value) for name, value in case.callspec.params.items()}


def sample(cases: Sequence[dict[str, int]], size: int) -> set[int]:
    """The positions of at most `size` cases that have as many different values of every parameter as there is room for.

    Args:
      cases: for each case a number of every parameter's value.
      size: how many to take.
    """
    kept, seen = [], {}
    remaining = list(range(len(cases)))
    while remaining and len(kept) < size:
        # The case with the most values that were never taken; then that whose values were taken least often so far.
        def rank(i: int) -> tuple[int, int]:
            counts = [seen.get(value, 0) for value in cases[i].items()]
            return -counts.count(0), sum(counts)

        best = min(remaining, key=rank)
        remaining.remove(best)
        kept.append(best)
        for value in cases[best].items():
            seen[value] = seen.get(value, 0) + 1
    return set(kept)
