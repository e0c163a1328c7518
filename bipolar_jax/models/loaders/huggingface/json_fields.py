"""JSON files of a Hugging Face directory, and typed lookups in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bipolar_jax.checkpoint.json_text import parse_json
from bipolar_jax.models.config import MOST_SIZE

_LARGEST = sys.float_info.max


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises FileNotFoundError, or ValueError if the file is not a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: download the whole model directory")
    try:
        value = parse_json(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error!s:.200}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object; download it again")
    return value


class Fields:
    """Typed lookups in a JSON object; null counts as absent.

    All but `get` raise ValueError for a value of another type or a missing field without default.
    """

    def __init__(self, values: dict[str, Any], source: Path):
        """Wraps `values`; `source` is the file named in errors."""
        self.values, self.source = values, source

    def get(self, name: str, default: Any = None) -> Any:
        """The value of any type."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """An integer of at least 1 that fits an int32."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_SIZE:
            raise self.wrong(name, value, f"an integer of at least 1 and at most {MOST_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= _LARGEST:  # False for NaN; exact for integers of any length
            raise self.wrong(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def nested(self, name: str) -> Fields:
        """An object; empty if absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, self.source)

    def wrong(self, name: str, value: Any, expected: str) -> ValueError:
        """The error for a field with an unexpected value."""
        return ValueError(f"{self.source}: {name} is {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    """The value, cut short. Python refuses to print integers of thousands of digits, and nests only so deep."""
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to print"
