"""Parses JSON of files that may be damaged, in bounded memory."""

from __future__ import annotations

import json
from typing import Any

# Python takes some 90 bytes for a list or an object. No file of a model has one for every few characters.
_CHARACTERS_PER_CONTAINER = 8
_SMALL = 100_000


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: the text is not JSON, is nested too deep, or consists of brackets for the most part.
    """
    containers = text.count("[") + text.count("{")
    if containers > _SMALL and containers * _CHARACTERS_PER_CONTAINER > len(text):
        raise ValueError(f"its {len(text):,} characters have {containers:,} brackets")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
