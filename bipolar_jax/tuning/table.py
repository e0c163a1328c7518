"""Reads the tables."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from typing import Any

# GPUs of the same chip, but for its memory: one takes the other's entry where it has none that is near.
_SAME_CHIP = {"NVIDIA H100 80GB HBM3": "NVIDIA H200", "NVIDIA H200": "NVIDIA H100 80GB HBM3"}

# How far, in octaves over all three sizes together, a measured problem may be from the one asked for.
_FARTHEST = 1.5


def table_name(device_kind: str) -> str:
    """The file that holds a device's table, such as "nvidia_h200.json" for "NVIDIA H200"."""
    return device_kind.lower().replace(" ", "_") + ".json"


@functools.cache
def load_table(device_kind: str) -> dict[str, Any] | None:
    """A device's table, or None where none is shipped."""
    file = importlib.resources.files(__package__) / table_name(device_kind)
    return json.loads(file.read_text()) if file.is_file() else None


def entries_of_kind(device_kind: str, kind: str) -> list[dict[str, Any]]:
    """What was measured of one kind on a device itself."""
    table = load_table(device_kind)
    return [] if table is None else [entry for entry in table["entries"] if entry["kind"] == kind]


@functools.cache
def nearest_entry(device_kind: str, kind: str, m: int, n: int, steps: int) -> dict[str, Any] | None:
    """The entry measured for the most similar product, or None if none is similar.

    Those of a GPU of the same chip serve where the device has none that is similar.

    Args:
      device_kind: as JAX names it.
      kind: of operands, "planes" or "int8"; or of the kernel, `plan.FEW_TOKENS`.
      m: rows of the output, or what they are in the kernel's units.
      n: its columns.
      steps: length of the mainloop, in 128-byte rows of K over all pairs of planes.
    """

    def distance(entry):
        sizes = zip((m, n, steps), (entry["m"], entry["n"], entry["steps"]), strict=True)
        return sum(abs(math.log2(asked / measured)) for asked, measured in sizes)

    for device in (device_kind, _SAME_CHIP.get(device_kind, device_kind)):
        nearest = min(entries_of_kind(device, kind), key=distance, default=None)
        if nearest is not None and distance(nearest) <= _FARTHEST:
            return nearest
    return None
