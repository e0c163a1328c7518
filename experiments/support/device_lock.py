"""A lock between processes on the device that they measure, so that their kernels never run at the same time.

Tracing and compiling take longer than the timed runs and do not need the device. To measure a list of shapes
faster, start one process per shape: each compiles while another one holds the lock.

    for shape in 4096 8192; do
        python -m experiments.bench.matmul --config=... --workdir=DIR --config.shapes=$shape &
    done; wait

Where wall times are measured, tracing in other processes would slow the launches: they trace under the lock shared, so
that nobody measures meanwhile. So do those that make models, or whose programs XLA times products of.

Processes whose CUDA_VISIBLE_DEVICES lists disjoint device numbers run at the same time. A process without such a list
excludes all others.
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

# Open lock files and their flock modes, in the order in which every process acquires them (so no deadlock).
_held: list[tuple[TextIO, int]] = []


def _locks() -> list[tuple[Path, int]]:
    """Lock files and flock modes: one file for all devices, shared if device numbers are known, and one per number."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    prefix = f"bipolar_jax_{getpass.getuser()}_device"
    all_devices = Path(tempfile.gettempdir()) / f"{prefix}s.lock"
    if not all(device.isdecimal() for device in devices):
        return [(all_devices, fcntl.LOCK_EX)]
    numbers = sorted({int(device) for device in devices})
    return [(all_devices, fcntl.LOCK_SH)] + [
        (all_devices.with_name(f"{prefix}_{number}.lock"), fcntl.LOCK_EX) for number in numbers
    ]


@contextlib.contextmanager
def device_lock(*, shared: bool = False) -> Iterator[None]:
    """Waits for the lock and holds it for the block; a shared one excludes only those that measure."""
    global _held
    with contextlib.ExitStack() as stack:
        modes = [(path, fcntl.LOCK_SH if shared else mode) for path, mode in _locks()]
        _held = [(stack.enter_context(path.open("w")), mode) for path, mode in modes]
        _acquire()
        try:
            yield
        finally:
            _release()
            _held = []


@contextlib.contextmanager
def device_unlocked() -> Iterator[None]:
    """Releases the lock for the block, after this process's work on the device is complete.

    For compilation inside `device_lock`; outside it this does nothing.
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


@contextlib.contextmanager
def device_shared() -> Iterator[None]:
    """Shares the lock for the block, after this process's work on the device is complete: nobody measures meanwhile.

    For what uses the device, but may do so beside others, inside `device_lock`; outside it this does nothing.
    """
    if not _held:
        yield
        return
    jax.block_until_ready(jax.live_arrays())
    _release()  # a lock that is converted while another process waits for it could wait for that one
    _acquire(shared=True)
    try:
        yield
        jax.block_until_ready(jax.live_arrays())
    finally:
        _release()
        _acquire()


def _acquire(*, shared: bool = False) -> None:
    for lock, mode in _held:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else mode)


def _release() -> None:
    for lock, _ in _held:
        fcntl.flock(lock, fcntl.LOCK_UN)
