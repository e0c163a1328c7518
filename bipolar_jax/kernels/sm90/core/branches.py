"""Branches of kernels and conditions as integers, without the processes that Mosaic GPU starts to lower JAX's own.

JAX's `cond`, and with it `pl.when`, converts the condition to an integer. At every conversion of a bool Mosaic GPU
0.11.2 runs `ptxas --version`, which takes 10 ms: a model's first text has 200 branches. Here the condition selects an
integer, which LLVM takes back out: the machine code is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def as_integer(condition: Bool[Array, ""]) -> Int[Array, ""]:
    """1 where the condition holds, else 0; int32, as `condition.astype(jnp.int32)`."""
    return lax.select(condition, jnp.int32(1), jnp.int32(0))


def choose(condition: Bool[Array, ""], if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """`lax.cond` without operands: the result of `if_true()` where the condition holds, else of `if_false()`."""
    return lax.switch(as_integer(condition), (if_false, if_true))


def when(condition: Bool[Array, ""] | bool) -> Callable[[Callable[[], None]], None]:
    """`pl.when`: decorates a function without arguments, which runs where the condition holds."""

    def run(body: Callable[[], None]) -> None:
        if not isinstance(condition, bool):
            choose(condition, body, lambda: None)
        elif condition:
            body()

    return run
