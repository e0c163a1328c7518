"""How hard XLA tries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def optimizations(on: bool) -> Iterator[None]:
    """What is compiled in the block is optimized or not.

    Not, for what runs once or twice and takes longer to compile, where nobody compares last bits.
    """
    before = jax.config.read(_FLAG)
    jax.config.update(_FLAG, not on)
    try:
        yield
    finally:
        jax.config.update(_FLAG, before)
