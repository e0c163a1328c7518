"""Runs a command under a time limit and kills it from outside: a GPU kernel that hangs ignores every exception."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SECONDS_TO_DIE = 20


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      returncode: its exit status, or None if it was killed at its limit.
      seconds: wall time.
      output: standard output and error together.
    """

    returncode: int | None
    seconds: float
    output: str

    @property
    def hung(self) -> bool:
        return self.returncode is None


def run(command: Sequence[str], limit: float, output: Path, env: Mapping[str, str] | None = None) -> Ended:
    """Runs a command in a process group of its own; kills the whole group after `limit` seconds.

    Args:
      command: program and arguments.
      limit: seconds of wall time.
      output: file for what it prints; it is kept.
      env: variables that are added to this process's.
    """
    begun = time.monotonic()
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (env or {}), start_new_session=True
        )
        try:
            returncode = process.wait(limit)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process inside the driver may not die at once
                process.wait(_SECONDS_TO_DIE)
    return Ended(returncode, time.monotonic() - begun, output.read_text(errors="replace"))
