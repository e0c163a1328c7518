"""Typed lookups in the metadata of a GGUF file."""

from __future__ import annotations

import math
from typing import Any


class Metadata:
    """Typed lookups in a GGUF file's metadata.

    A missing key gives the default; a value of another type or range, as in a damaged file, raises ValueError.
    """

    def __init__(self, values: dict[str, Any], source: str):
        """Wraps `values`; `source` is the file named in errors."""
        self._values, self.source = values, source

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None, least: int = 0, most: int | None = None) -> int | None:
        """An integer from `least` to `most`."""
        expected = f"an integer of at least {least}" + (f" and at most {most}" if most else "")
        return self._get(key, default, int, lambda value: least <= value <= (most or value), expected)

    def positive(self, key: str, default: float | None = None) -> float | None:
        """A positive finite number."""
        good = lambda value: math.isfinite(value) and value > 0  # noqa: E731
        return self._get(key, default, (float, int), good, "a positive number")

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string."""
        return self._get(key, default, str, lambda value: True, "a string")

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        return self._get(key, default, bool, lambda value: True, "a bool")

    def array(self, key: str, kind: type) -> list | None:
        """A list with items of type `kind`."""
        good = lambda value: all(isinstance(item, kind) for item in value)  # noqa: E731
        return self._get(key, None, list, good, f"an array of {kind.__name__}")

    def require(self, value: Any, key: str) -> Any:
        """`value`, the result of a lookup of `key`; raises ValueError if it is None."""
        if value is None:
            raise ValueError(f"{self.source} has no metadata key {key!r}: convert the model again")
        return value

    def _get(self, key, default, kinds, good, expected):
        if key not in self._values:
            return default
        value = self._values[key]
        # bool is a subclass of int.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool) or not good(value):
            raise ValueError(
                f"{self.source}: metadata key {key!r} is {value!r:.60}, expected {expected}; download it again"
            )
        return value
