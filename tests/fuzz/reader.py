"""What the fuzz program runs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and the file that it is given damaged.

    Attributes:
      path: the damaged file.
      intact: its content.
      damage: returns a damaged content.
      read: reads it, and uses what it read where damage would only show then.
    """

    path: Path
    intact: bytes
    damage: Callable[[random.Random], bytes]
    read: Callable[[], Any]
