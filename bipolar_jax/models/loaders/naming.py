"""Errors that name the file they are about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """Puts `source` before the ValueErrors of code that does not know which file it works for."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
