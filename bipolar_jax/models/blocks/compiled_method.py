"""Methods of models that eager calls compile once for each shape."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.ops.compiled import compiled


def compiled_method[Result](method: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a method of a module, so that a call outside of `jax.jit` runs a cached program.

    Arguments that are ints, texts or None are static. Within a trace the operations are those of the undecorated
    method. A model with variables that a call may change, such as the streams of `nnx.Dropout`, runs operation by
    operation.
    """
    signature = inspect.signature(method)

    @compiled
    def program(static, state, arrays):
        graph, constants = static
        return method(nnx.merge(graph, state), **arrays, **dict(constants))

    @functools.wraps(method)
    def call(self, *args: Any, **kwargs: Any) -> Result:
        graph, state = nnx.split(self)
        variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state))
        if is_traced or not all(isinstance(variable, nnx.Param | Packed) for variable in variables):
            return method(self, *args, **kwargs)
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        arguments.pop("self")
        constants = tuple(
            (name, value) for name, value in arguments.items() if value is None or type(value) in (int, str)
        )
        arrays = {name: value for name, value in arguments.items() if name not in dict(constants)}
        return program((graph, constants), state, arrays)

    return call
