"""Bounds the memory of a test process, which JAX's caches of compiled programs would let grow without end."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from pathlib import Path

import jax

_LIMIT = 1 << 30  # bytes; a worker stays below 2 GB with what one test adds
_STEP = 256 << 20  # bytes that must have been added since the caches were last cleared
_MAX_MAPPINGS = 35_000  # Linux allows a process 65,530; beyond, XLA crashes as it compiles
_BETWEEN_COUNTS = 2.0  # seconds: counting takes milliseconds, and a test adds some hundreds of mappings at most
_after_clearing = 0
_counted = 0.0


def forget_programs_beyond_the_limit() -> None:
    """Clears JAX's caches if the process has grown large; to be called between tests."""
    global _after_clearing
    if not Path("/proc/self/statm").exists():
        return
    if _resident_bytes() > max(_LIMIT, _after_clearing + _STEP) or _too_many_mappings():
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed otherwise
        _after_clearing = _resident_bytes()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _too_many_mappings() -> bool:
    global _counted
    if time.monotonic() - _counted < _BETWEEN_COUNTS:
        return False
    _counted = time.monotonic()
    return Path("/proc/self/maps").read_bytes().count(b"\n") > _MAX_MAPPINGS
