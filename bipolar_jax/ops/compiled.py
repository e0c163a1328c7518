"""Operations that eager calls compile once for each shape, as `jax.jit` does; programs compiled before they are called.

`jax.jit` keeps what `lower(...).compile()` makes: a call with operands as they were described finds the program.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp

from bipolar_jax.kernels.device import default_device
from bipolar_jax.kernels.sm90.core import execution, kernel_programs
from bipolar_jax.ops import dispatch

# In which a program that is in JAX's persistent compilation cache has been read.
_CACHED_SECONDS = 0.3


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

    Python traces and lowers on the caller's thread, XLA compiles without Python. The Mosaic kernels of a program are
    compiled on further threads, where XLA would compile one after the other.

    Raises:
      Whatever lowering or compiling raises, of the first program that fails.

    Warns:
      UserWarning: kernels could not be compiled apart, so that programs compile more slowly.
    """
    kernels, device = [], default_device()
    with ThreadPoolExecutor() as threads:
        with _no_garbage_collection():
            compiled = []
            for program in programs:
                of_program = kernel_programs.kernels_of(program)  # before another thread reads the program
                compiled.append(threads.submit(program.compile))
                for kernel_hash, kernel in of_program.items():
                    if kernel_hash not in _compiled_kernels:
                        _compiled_kernels.add(kernel_hash)
                        kernels.append(threads.submit(_compile_kernel, kernel_hash, kernel, device, compiled[-1]))
        for each in compiled:
            each.result()
    failures = [kernel.exception() for kernel in kernels if kernel.exception() is not None]
    if failures:
        apart = f"{len(failures)} of {len(kernels)} kernels could not be compiled apart"
        warnings.warn(f"{apart}, so that programs compile more slowly: {failures[0]}", stacklevel=2)


_compiled_kernels: set[bytes] = set()


def _compile_kernel(kernel_hash: bytes, kernel: Any, device: jax.Device, program: Future) -> None:
    """Compiles a kernel of a program that is being compiled, unless this is found in JAX's persistent cache."""
    if jax.config.jax_compilation_cache_dir is not None:
        wait([program], timeout=_CACHED_SECONDS)
    if program.done():
        _compiled_kernels.discard(kernel_hash)  # another program may have to compile it
    else:
        kernel_programs.compile_kernel(kernel, device)


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
