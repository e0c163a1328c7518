"""JSON objects of a Hugging Face directory, and typed look-ups in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError where the file is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: download the whole model directory")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is damaged: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object; download it again")
    return value


class Fields:
    """Typed look-ups in one JSON object; null is the same as absent."""

    def __init__(self, values: dict[str, Any], source: Path):
        self.values, self.source = values, source

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, value, "an integer of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value <= 0:
            raise self.wrong(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def nested(self, name: str) -> Fields:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, self.source)

    def wrong(self, name: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self.source}: {name} is {value!r:.60}, expected {wanted}")
