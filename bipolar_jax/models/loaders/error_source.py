"""Error messages that start with the name of the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def errors_name(source: str | os.PathLike[str]) -> Iterator[None]:
    """Prefixes the message of a ValueError in the block with `source`, unless it has that prefix."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(str(source)):
            raise
        raise ValueError(f"{source}: {error}") from error
