"""Switches XLA's optimizations on and off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def optimizations(on: bool) -> Iterator[None]:
    """Within, programs are compiled with or without optimizations; tests run without, as conftest.py sets it."""
    before = jax.config.read(_FLAG)
    jax.config.update(_FLAG, not on)
    try:
        yield
    finally:
        jax.config.update(_FLAG, before)
