"""Chains of compiled programs: called one after the other, or compiled side by side before the first one runs.

A chain is written once, as a function of `run`, which gets each program with its arguments. Most programs compile for
much longer than they run, and which ones a chain needs is known from shapes alone.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any, Self

import jax

# Calls a compiled program with arguments and static keyword arguments.
Run = Callable[..., Any]

# More threads compile no faster: Python makes the programs one after the other.
_MOST_THREADS = 8


def call(program: Any, *arguments: Any, **static: Any) -> Any:
    """program(*arguments, **static)."""
    return program(*arguments, **static)


class SideBySide:
    """Compiles the programs that it is called with, each in a thread, and returns the shapes of their results.

    JAX keeps an executable with its lowered program, so that calls with such arguments compile nothing. Use it in
    `with`, whose end waits for all programs.
    """

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
        self._results: dict[Any, Any] = {}
        self._compiling: list[concurrent.futures.Future] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        with self._pool:
            if error[0] is None:
                for program in self._compiling:
                    program.result()

    def __call__(self, program: Any, *arguments: Any, **static: Any) -> Any:
        """The shapes of program(*arguments, **static), whose arguments may be shapes; starts its compilation."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (program, structure, tuple(map(_aval, leaves)), tuple(sorted(static.items())))
        if key not in self._results:
            lowered = program.lower(*arguments, **static)
            self._compiling.append(self._pool.submit(lowered.compile))
            self._results[key] = jax.tree.map(lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype), lowered.out_info)
        return self._results[key]


def _aval(leaf: Any) -> Any:
    """What a program's compilation depends on of an argument."""
    if hasattr(leaf, "shape"):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)
    return type(leaf)
