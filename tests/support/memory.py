"""Bounds the memory of a test process, which JAX's caches of compiled programs would let grow without end."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import jax

_LIMIT = 1 << 30  # bytes; a worker stays below 2 GB with what one test adds
_STEP = 256 << 20  # bytes that must have been added since the caches were last cleared
_MAX_MAPPINGS = 35_000  # Linux allows a process 65,530; beyond, XLA crashes as it compiles
_after_clearing = 0


def forget_programs_beyond_the_limit() -> None:
    """Clears JAX's caches if the process has grown large; to be called between tests."""
    global _after_clearing
    if not Path("/proc/self/statm").exists():
        return
    grown = _resident_bytes() > max(_LIMIT, _after_clearing + _STEP)
    if grown or _mappings() > _MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed otherwise
        _after_clearing = _resident_bytes()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")
