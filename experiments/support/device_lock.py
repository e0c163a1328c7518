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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

# Open lock files and the flock modes of measuring, in the order in which every process acquires them (so no deadlock).
_held: list[tuple[TextIO, int]] = []
_state = "unlocked"  # or "alone", "shared": how this process has the lock now
_waited = 0.0  # seconds that this process has waited for the lock


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
        _held = [(stack.enter_context(path.open("w")), mode) for path, mode in _locks()]
        try:
            _change("shared" if shared else "alone")
            yield
        finally:
            _change("unlocked")
            _held = []


def device_unlocked() -> contextlib.AbstractContextManager[None]:
    """Releases the lock for the block, after this process's work on the device is complete.

    For tracing and compilation inside `device_lock`; outside it this does nothing.
    """
    return _changed("unlocked")


def device_shared() -> contextlib.AbstractContextManager[None]:
    """Shares the lock for the block, after this process's work on the device is complete: nobody measures meanwhile.

    For what uses the device, but may do so beside others, inside `device_lock`; outside it this does nothing.
    """
    return _changed("shared")


def device_alone() -> contextlib.AbstractContextManager[None]:
    """Takes the lock alone for the block, to measure; inside `device_lock`, outside it this does nothing."""
    return _changed("alone")


@contextlib.contextmanager
def phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the block's seconds to `seconds[name]`; those in which it waited for the lock to `seconds["wait"]`."""
    started, waited_before = time.perf_counter(), _waited
    try:
        yield
    finally:
        waited = _waited - waited_before
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started - waited
        seconds["wait"] = seconds.get("wait", 0.0) + waited


@contextlib.contextmanager
def _changed(state: str) -> Iterator[None]:
    if not _held:
        yield
        return
    before = _state
    _finish_work(before)
    _change(state)
    try:
        yield
        _finish_work(state)
    finally:
        _change(before)


def _finish_work(state: str) -> None:
    if state != "unlocked":
        jax.block_until_ready(jax.live_arrays())


def _change(state: str) -> None:
    """Releases before it acquires: a lock converted while another process waits for it could wait for that one."""
    global _state, _waited
    if state == _state:
        return
    for lock, _ in _held:
        fcntl.flock(lock, fcntl.LOCK_UN)
    _state = "unlocked"
    if state == "unlocked":
        return
    started = time.perf_counter()
    for lock, mode in _held:
        fcntl.flock(lock, fcntl.LOCK_SH if state == "shared" else mode)
    _state = state
    _waited += time.perf_counter() - started
