"""Reads tuning tables and finds the entry nearest to a problem."""

from __future__ import annotations

import functools
import importlib.resources
import math
from typing import Any

from bipolar_jax.tuning.parse import parse_table

# Where a GPU has no entry that is near enough, that of one with the same chip is used. Not the other way round: an H200
# took 11% less for 17 x 18944 x 4096 at W2A4 with the first tiling that fits than with an H100's for few tokens.
_SAME_CHIP = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}

# Largest distance of an entry that is used: the sum over m, n and steps of |log2(asked / measured)|.
_MAX_DISTANCE = 1.5


def table_name(device_kind: str) -> str:
    """File name of a device's table, such as "nvidia_h200.json" for "NVIDIA H200"."""
    return device_kind.lower().replace(" ", "_") + ".json"


@functools.cache
def load_table(device_kind: str) -> dict[str, Any] | None:
    """Reads a device's table; None if the package has none for it. Raises ValueError as `parse_table`."""
    file = importlib.resources.files(__package__) / table_name(device_kind)
    return parse_table(file.read_text(), str(file)) if file.is_file() else None


def entries_of_kind(device_kind: str, kind: str) -> list[dict[str, Any]]:
    """The entries of one kind in the table of the device itself; [] if it has no table."""
    table = load_table(device_kind)
    return [] if table is None else [entry for entry in table["entries"] if entry["kind"] == kind]


@functools.cache
def nearest_entry(device_kind: str, kind: str, m: int, n: int, steps: int) -> dict[str, Any] | None:
    """The entry of the nearest measured product, or None if none is near enough.

    Looks in the device's own table first, then in that of a GPU with the same chip.

    Args:
      device_kind: the device's name in JAX.
      kind: "planes" or "int8", the operands of the product of many tokens; "few tokens" for the
        product of few tokens.
      m: rows of the output; for "few tokens" the accumulator's columns.
      n: columns of the output.
      steps: steps of the mainloop: 128-byte rows of K, summed over all pairs of planes, or for
        "few tokens" over the planes of the weights.
    """

    def distance(entry):
        sizes = zip((m, n, steps), (entry["m"], entry["n"], entry["steps"]), strict=True)
        return sum(abs(math.log2(asked / measured)) for asked, measured in sizes)

    for device in (device_kind, _SAME_CHIP.get(device_kind, device_kind)):
        nearest = min(entries_of_kind(device, kind), key=distance, default=None)
        if nearest is not None and distance(nearest) <= _MAX_DISTANCE:
            return nearest
    return None
