"""Products on meshes with Explicit axes, which `jax.make_mesh` gives by default."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array, Shaped

from bipolar_jax.packing.cuts import MeshAxes


def mesh_axes(array: Shaped[Array, "*shape"]) -> tuple[MeshAxes, ...]:
    """What each axis of an array is sharded over, by its type; None for axes that are not, or on Auto meshes."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def explicit_mesh(operands: Any) -> AbstractMesh | None:
    """The mesh with Explicit axes that a leaf of these operands lies on, or that is set around them; None without."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


@contextlib.contextmanager
def set_axes_are_auto() -> Iterator[None]:
    """Within, all axes of the mesh that `jax.set_mesh` has set are Auto: for programs that place their results."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:
        mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def merged_to_matrix(
    array: Shaped[Array, "*shape"], batch_ndim: int, num_rows_axes: int
) -> Shaped[Array, "*batch k n"]:
    """Merges `num_rows_axes` axes after the first `batch_ndim` into rows, and the others into columns.

    Rows are contracted and packed, so on an Explicit mesh they are gathered; columns keep the sharding of their first
    axis, because that of others would not be contiguous.
    """
    rows_end = batch_ndim + num_rows_axes
    rows, columns = (math.prod(axes) for axes in (array.shape[batch_ndim:rows_end], array.shape[rows_end:]))
    shape = (*array.shape[:batch_ndim], rows, columns)
    axes = mesh_axes(array)
    wanted = (*axes[:batch_ndim], None, axes[rows_end] if rows_end < array.ndim else None)
    return with_out_sharding(lambda array: array.reshape(shape), wanted, (array,))


def with_out_sharding[Result](
    function: Callable[..., Result], wanted: Sequence[MeshAxes], operands: Sequence[Any]
) -> Result:
    """function(*operands), its result sharded over Explicit axes as lax.dot_general would; the compiler does the rest.

    Packing, folding and scanning have no sharding of their own, so within the function the axes are Auto.

    Args:
      function: gives one array.
      wanted: mesh axes of every axis of the result. A mesh axis that is named again is dropped.
      operands: pytrees of arrays.
    """
    explicit = explicit_mesh(operands)
    if explicit is None:
        return function(*operands)
    spec, used = [], set()
    for axes in wanted:
        names = (axes,) if isinstance(axes, str) else axes or ()
        free = tuple(name for name in names if name not in used)
        used.update(free)
        spec.append(free or None)
    out_sharding = jax.NamedSharding(explicit, jax.P(*spec))
    return jax.sharding.auto_axes(function, axes=explicit.explicit_axes, out_sharding=out_sharding)(*operands)
