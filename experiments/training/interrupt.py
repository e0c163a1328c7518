"""Ctrl-C during training: no SIGINT is lost, and none stops the program in the middle of a step."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class Interrupt:
    """Whether SIGINT has arrived.

    Python's own handler raises KeyboardInterrupt wherever the program is, also where a library ignores it or where
    the state is half updated. This one remembers the signal, and raises only outside `deferred`, or the second time.

    Attributes:
      requested: SIGINT has arrived.
    """

    def __init__(self):
        self.requested = False
        self._deferring = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[Interrupt]:
        """Handles SIGINT while the block runs, if this is the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Leaves it to the block to stop when `requested` is set."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, signum, frame) -> None:
        again, self.requested = self.requested, True
        if again or not self._deferring:
            raise KeyboardInterrupt
        print("interrupted: stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
