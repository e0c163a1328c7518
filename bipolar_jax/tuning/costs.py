"""Fitted costs of kernels: coefficients by kernel and name, as `experiments.bench.fit_costs` writes them."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

# Of an H200. An H100 has the same chip; its slower memory matters to few of the products that are planned so.
FILE = "nvidia_h200_costs.json"


@functools.cache
def load_costs() -> dict[str, Any]:
    """The file: {"device": name, "kernels": {kernel: {"coefficients": {name: microseconds a count}, ...}}}.

    Beside them are what they were before any measurement ("prior"), the results that they are fitted to, and errors.
    """
    return json.loads((importlib.resources.files(__package__) / FILE).read_text())


def coefficients_of(kernel: str) -> dict[str, float]:
    """Microseconds a count, by name."""
    return load_costs()["kernels"][kernel]["coefficients"]
