"""Operations that eager calls compile once for each shape, as `jax.jit` does; programs compiled before they are called.

`jax.jit` keeps what `lower(...).compile()` makes: a call with operands as they were described finds the program.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.ops import dispatch


def compiled[Result](function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates function(static, *operands), so that a call outside of `jax.jit` runs a cached program.

    `static` is hashable, operands are pytrees of arrays. Within a trace the operations are those of the undecorated
    function: programs are the same either way. The backend may depend on more than on the operands, so this is part of
    the cache's key. Kernels that are interpreted, for tests, are traced anew in every call.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
    @functools.wraps(function)
    def program(environment: Hashable, static: Hashable, *operands: Any) -> Result:
        del environment
        return function(static, *operands)

    @functools.wraps(function)
    def call(static: Hashable, *operands: Any) -> Result:
        if execution.interpret_params() is not None:
            return function(static, *operands)
        return program(_environment(), static, *operands)

    return call


def as_array(x: Any) -> jax.Array:
    """`jnp.asarray(x)`, but arrays stay as they are.

    Where an eager call is differentiated, `asarray` binds a conversion of its own, which takes half a millisecond.
    """
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def compile_together(programs: Iterable[jax.stages.Lowered]) -> None:
    """Compiles each program on a thread of its own while the next one is lowered; no two of them may be the same.

    Python traces and lowers on the caller's thread, XLA compiles without Python.

    Raises:
      Whatever lowering or compiling raises, of the first program that fails.
    """
    with ThreadPoolExecutor() as threads:
        with _no_garbage_collection():
            compiled = [threads.submit(program.compile) for program in programs]
        for each in compiled:
            each.result()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within, no cycles are collected: an eighth of the time of lowering, whose many objects stay alive meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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


def _environment() -> Hashable:
    """What the choice of a backend depends on, beside the operands and JAX's own settings."""
    device = default_device()
    return tuple(dispatch.BACKENDS.items()), dispatch.AUTO_ORDER, device.platform, execution.is_hopper(device)
