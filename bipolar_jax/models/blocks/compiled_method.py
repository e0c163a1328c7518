"""Methods of models that eager calls compile once for each shape, and that take ids on meshes of Explicit axes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from bipolar_jax.nn.layers.packed import Packed
from bipolar_jax.ops.compiled import compiled
from bipolar_jax.ops.explicit_sharding import explicit_mesh, mesh_axes, with_out_sharding


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


def on_auto_axes[Result](method: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates method(self, ids, *static), whose array has an axis more than the ids, and is sharded as they are.

    Embeddings, loops over layers and residuals have no shardings of their own on meshes of Explicit axes, so within the
    method these are Auto.
    """

    @functools.wraps(method)
    def call(self, ids: Any, *static: Any, **named: Any) -> Result:
        graph, state = nnx.split(self)
        if explicit_mesh((state, ids)) is None:
            return method(self, ids, *static, **named)
        run = lambda state, ids: method(nnx.merge(graph, state), ids, *static, **named)  # noqa: E731
        return with_out_sharding(run, (*mesh_axes(ids), None), (state, ids))

    return call


def check_axes_are_auto(ids: Any) -> None:
    """Raises ValueError for ids on a mesh of Explicit axes, which a cache has no sharding for."""
    if (mesh := explicit_mesh(ids)) is not None:
        raise ValueError(
            f"caches have no sharding on the Explicit axes {dict(mesh.shape)}: give shard_model the mesh and run what "
            "it returns, or make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
        )
