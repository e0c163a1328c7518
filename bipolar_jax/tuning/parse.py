"""Parses tuning tables, and says which field of a damaged one is wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

_MOST = 2**31 - 1
# Field of a tiling -> its values; those of kernels for many tokens, and for few.
_MANY = {
    "tile_m": (64, 128),
    "tile_n": (64, 128, 192, 256),
    "schedule": ("split_m", "split_n", "alternate"),
    "slots": range(2, 65),
    "cluster_m": (1, 2),
    "cluster_n": (1, 2),
    "band": range(1, _MOST),
    "band_axis": ("m", "n"),
    "splits": range(1, 2),  # outputs that are no matrix take these tilings, too
}
_FEW = {"warpgroups": range(1, 5), "w_slots": range(1, 65), "x_slots": range(1, 65), "parts": range(1, 65)}
TILINGS = {"planes": _MANY, "int8": _MANY, "few tokens": _FEW}


def parse_table(text: str, source: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a JSON text: {"device": name, "entries": [entry, ...]}.

    An entry has the fields kind, m, n, steps, shape, microseconds, and tiling, whose fields depend on the kind.

    Args:
      text: content of the file.
      source: the file, for messages.

    Raises:
      ValueError: the text is not such a table; the message names the file and the field.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"it is not JSON ({error!s:.200})") from error
    if not isinstance(table, dict):
        raise _damaged(source, f"it holds a {type(table).__name__}, expected an object")
    for name, kind in (("device", str), ("entries", list)):
        if not isinstance(table.get(name), kind):
            raise _damaged(source, f"{name} is {_shown(table.get(name))}, expected a {kind.__name__}")
    for index, entry in enumerate(table["entries"]):
        _check_entry(entry, f"entries[{index}]", source)
    return table


def _check_entry(entry: Any, place: str, source: str | os.PathLike[str]) -> None:
    if not isinstance(entry, dict):
        raise _damaged(source, f"{place} is {_shown(entry)}, expected an object")

    def check(name: str, good: Callable[[Any], bool], expected: str) -> None:
        if not good(entry.get(name)):
            raise _damaged(source, f"{place}.{name} is {_shown(entry.get(name))}, expected {expected}")

    check("kind", lambda kind: isinstance(kind, str) and kind in TILINGS, f"one of {', '.join(TILINGS)}")
    for name in ("m", "n", "steps"):
        check(name, lambda size: type(size) is int and 1 <= size <= _MOST, "an integer of at least 1")
    check("shape", lambda shape: isinstance(shape, str), "a text")
    check("microseconds", _is_positive, "a positive number")
    fields = TILINGS[entry["kind"]]
    names = ", ".join(fields)
    check("tiling", lambda tiling: isinstance(tiling, dict) and set(tiling) <= set(fields), f"an object with {names}")
    for name, values in fields.items():
        value = entry["tiling"].get(name, 1 if name in ("parts", "splits") else None)
        if type(value) is not type(values[0]) or value not in values:  # a text in a range is compared with all of it
            allowed = f"{values[0]} to {values[-1]}" if isinstance(values, range) else ", ".join(map(str, values))
            raise _damaged(source, f"{place}.tiling.{name} is {_shown(value)}, expected {allowed}")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _shown(value: Any) -> str:
    """The value, cut short. Python refuses to print integers of thousands of digits."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "a number of thousands of digits"


def _damaged(source: str | os.PathLike[str], problem: str) -> ValueError:
    return ValueError(
        f"tuning table {source} is damaged: {problem}; restore it, or delete it and run experiments/bench/tune.py"
    )
