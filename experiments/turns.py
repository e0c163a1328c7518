"""Experiments on one machine use its device in turn, so that none disturbs the times of another.

Preparing the kernels takes the host several times as long as the device needs to run them, so a
list of shapes is measured sooner by one process a shape:

    for shape in 4096 8192; do
        python -m experiments.bench_matmul --config=... --workdir=DIR --config.shapes=$shape &
    done; wait
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

_LOCK = Path(tempfile.gettempdir()) / f"bipolar_jax_device_{getpass.getuser()}.lock"
_held: TextIO | None = None


@contextlib.contextmanager
def device_turn() -> Iterator[None]:
    """Waits until no other process is in such a block, and keeps others out of theirs."""
    global _held
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held = lock
        try:
            yield
        finally:
            _held = None
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextlib.contextmanager
def others_turn() -> Iterator[None]:
    """Inside `device_turn`, lets other processes have the device while this one does not need it.

    Waits first until the device has done what this process asked of it.
    """
    if _held is None:
        yield
        return
    jax.block_until_ready(jax.live_arrays())
    fcntl.flock(_held, fcntl.LOCK_UN)
    try:
        yield
    finally:
        fcntl.flock(_held, fcntl.LOCK_EX)
