"""Experiments on one machine use its device in turn, so that none disturbs the times of another.

Preparing the kernels takes the host several times as long as the device needs to run them, so a
list of shapes is measured sooner by one process a shape:

    for shape in 4096 8192; do
        python -m experiments.bench.matmul --config=... --workdir=DIR --config.shapes=$shape &
    done; wait

Programs that see different devices alone (CUDA_VISIBLE_DEVICES with numbers) do not wait for each other; one that sees
all of them waits for all others, and they for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

_held: list[tuple[TextIO, int]] = []  # locked files, and how, in the order in which all programs lock them


def _locks() -> list[tuple[Path, int]]:
    """What a program locks: with numbers of devices those, beside a file that all share who have numbers."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    begin = f"bipolar_jax_{getpass.getuser()}_device"
    everything = Path(tempfile.gettempdir()) / f"{begin}s.lock"
    if not all(device.isdecimal() for device in devices):
        return [(everything, fcntl.LOCK_EX)]
    ordered = sorted({int(device) for device in devices})
    return [(everything, fcntl.LOCK_SH)] + [
        (everything.with_name(f"{begin}_{device}.lock"), fcntl.LOCK_EX) for device in ordered
    ]


@contextlib.contextmanager
def device_turn() -> Iterator[None]:
    """Waits until no other process is in such a block, and keeps others out of theirs."""
    global _held
    with contextlib.ExitStack() as stack:
        _held = [(stack.enter_context(path.open("w")), mode) for path, mode in _locks()]
        _acquire()
        try:
            yield
        finally:
            _release()
            _held = []


@contextlib.contextmanager
def others_turn() -> Iterator[None]:
    """Inside `device_turn`, lets other processes have the device while this one does not need it.

    Waits first until the device has done what this process asked of it.
    """
    if not _held:
        yield
        return
    jax.block_until_ready(jax.live_arrays())
    _release()
    try:
        yield
    finally:
        _acquire()


def _acquire() -> None:
    for lock, mode in _held:
        fcntl.flock(lock, mode)


def _release() -> None:
    for lock, _ in _held:
        fcntl.flock(lock, fcntl.LOCK_UN)
