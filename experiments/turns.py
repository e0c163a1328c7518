"""Experiments on one machine use its device in turn, so that none disturbs the times of another.

Preparing the kernels takes the host several times as long as the device needs to run them, so a
list of shapes is measured sooner by one process a shape:

    for shape in 4096 8192; do
        python -m experiments.bench_matmul --config=... --workdir=DIR --config.shapes=$shape &
    done; wait

Programs on different devices, each of which sees its own alone (CUDA_VISIBLE_DEVICES), do not wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

_held: TextIO | None = None


def lock_path() -> Path:
    """The file that is locked by whoever has the devices that this process sees."""
    devices = re.sub(r"[^\w,-]", "_", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    return Path(tempfile.gettempdir()) / f"bipolar_jax_{getpass.getuser()}_device_{devices}.lock"


@contextlib.contextmanager
def device_turn() -> Iterator[None]:
    """Waits until no other process is in such a block, and keeps others out of theirs."""
    global _held
    with lock_path().open("w") as lock:
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
