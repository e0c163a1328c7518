"""Operations that eager calls compile once for each shape, as `jax.jit` does, and traced calls inline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
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


def _environment() -> Hashable:
    """What the choice of a backend depends on, beside the operands and JAX's own settings."""
    device = default_device()
    return tuple(dispatch.BACKENDS.items()), dispatch.AUTO_ORDER, device.platform, execution.is_hopper(device)
