"""Compiles programs before they are called, at the same time.

`jax.jit` keeps what `lower(...).compile()` makes: a call with operands as they were described finds the program.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


def compile_together(programs: Iterable[jax.stages.Lowered]) -> None:
    """Compiles each program on a thread of its own while the next one is lowered; no two of them may be the same.

    Python traces and lowers on the caller's thread, XLA compiles without Python.

    Raises:
      Whatever lowering or compiling raises, of the first program that fails.
    """
    with ThreadPoolExecutor() as threads:
        for compiled in [threads.submit(program.compile) for program in programs]:
            compiled.result()


def described(array: Any) -> jax.ShapeDtypeStruct:
    """What the key of a compiled program has of an array: its devices only if it is bound to them."""
    sharding = array.sharding if getattr(array, "committed", False) else None
    weak_type = getattr(array, "weak_type", False)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding, weak_type=weak_type)


def on_one_device(arrays: Iterable[Any]) -> bool:
    """Whether the arrays exist, as those within a trace do not, and none is spread over several devices."""
    return not any(
        isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and len(array.sharding.device_set) > 1)
        for array in arrays
    )
