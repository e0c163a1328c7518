"""Products that partition themselves where XLA distributes a program: weights stay where they are.

XLA knows no sharding rule for kernels, nor for words of packed weights, and would gather both. Within `jax.jit`, on
meshes of Auto axes or of Explicit ones, a product is one operation that tells XLA what each device multiplies: columns
of its own if n is cut; its own part of k if that is cut, and then int32 sums are added (`parts_of_k`); rows of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.kernels.semantics.prologue import Activation
from bipolar_jax.ops.parts_of_k import PartsOfK, part_of, sum_of_parts
from bipolar_jax.packing import BipolarArray, BipolarNumbers, UnpackedArray
from bipolar_jax.packing.cuts import MeshAxes, check_cut, partition_specs

# product(static, x, residual, w, bias, prologue) of one device; `static` has a_format, activation and implementation.
Product = Callable[..., Float[Array, "m out"]]


def is_distributed(operands: Any, w: BipolarNumbers) -> bool:
    """Whether XLA will distribute the product: an operand lies on a mesh of several devices, outside of shard_map."""
    return isinstance(w, BipolarArray | UnpackedArray) and lies_on_mesh(operands)


def lies_on_mesh(operands: Any) -> bool:
    """Whether XLA distributes what is computed of an operand: it lies on several devices, outside of shard_map."""
    return any(True for _ in _meshes(operands))


def _meshes(operands: Any) -> Iterator[AbstractMesh]:
    """The meshes of several devices, all of Auto axes, that operands lie on."""
    for leaf in jax.tree.leaves(operands):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty and mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto}:
            yield mesh


def partitioned(product: Product, static: Any, *operands: Any) -> Float[Array, "m out"]:
    """product(static, *operands), each device's part of it where its part of the weights is.

    Args:
      product: of rows [m, columns] and one matrix of weights.
      static: its static operands.
      *operands: x, residual, w, bias, prologue.
    """

    call = _Call(static, _factors(static, operands), next(_meshes(operands)))

    @custom_vmap
    def whole(*operands):
        return _partitioned(product)(call, *operands)

    @whole.def_vmap
    def _(axis_size, in_batched, *operands):
        # XLA partitions products that are mapped over as it does other operations.
        del axis_size
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
        return jax.vmap(functools.partial(product, static), in_axes=axes)(*operands), True

    return whole(*operands)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static operands of a product, and how shardings propagate through it.

    Attributes:
      static: of the product.
      factors: the names of all operands' axes and of the result's, as an einsum: axes of one name are cut alike.
      mesh: that the operands lie on.
    """

    static: Any
    factors: str
    mesh: AbstractMesh


@functools.cache
def _partitioned(product: Product) -> custom_partitioning:
    # jax.jit keeps constant arrays within: custom_partitioning takes none.
    whole = jax.jit(lambda call, *operands: product(call.static, *operands), static_argnums=0)
    operation = custom_partitioning(whole, static_argnums=(0,))
    operation.def_partition(
        partition=functools.partial(_partition, product), sharding_rule=lambda call, mesh, *types: call.factors
    )
    return operation


def _factors(static: Any, operands: tuple) -> str:
    """`_Call.factors`: rows m go from x to the result, and so do columns n from w; `_partition` decides the rest."""
    _, residual, w, bias, prologue = operands
    gated = static.activation is not None and static.activation.gated
    columns = "n_out" if gated else "n"
    numbers = itertools.count()

    def others(count):
        return [f"f{next(numbers)}" for _ in range(count)]

    def of_weights(leaf):
        return [*others(leaf.ndim - 2), "n", *others(1)]

    axes = [["m", *others(1)]]
    axes += [] if residual is None else [["m", columns]]
    axes += [of_weights(leaf) for leaf in jax.tree.leaves(w)]
    axes += [] if bias is None else [["n"]]
    axes += [others(leaf.ndim) for leaf in jax.tree.leaves(prologue)]
    return f"{', '.join(map(' '.join, axes))} -> m {columns}"


def _partition(product: Product, call: _Call, mesh: Mesh, operands: Any, result: Any) -> tuple:
    """What one device computes, and the shardings of the result and of the operands; see `custom_partitioning`."""
    del result
    static = call.static
    x, residual, w, _, prologue = operands
    # A mesh that is set, but that nothing which enters the program lies on, is lost on the way; devices are known if
    # XLA has a sharding for an operand, and else nothing is cut.
    known = [leaf for leaf in jax.tree.leaves(operands) if leaf.sharding is not None]
    if mesh.empty and known:
        devices = [*known[0].sharding.devices_indices_map(known[0].shape)]
        mesh = Mesh(np.reshape(devices, call.mesh.axis_sizes), call.mesh.axis_names)
    n, k = _axes_of_weights(w, mesh)
    k = tuple(name for name in k if name not in n)
    m = tuple(name for name in _axes(x, mesh)[0] if name not in (*n, *k))
    if x.shape[0] % math.prod(mesh.shape[name] for name in m):
        m = ()
    spec = PartitionSpec(k or None, n or None) if w.axis == -2 else PartitionSpec(n or None, k or None)
    check_cut(w, mesh.shape, tuple(spec))
    # A gated activation takes columns of the first half with those of the second.
    gated = static.activation is not None and static.activation.gated and bool(n)
    columns = None if gated else n or None
    by_elements = prologue is None or (
        isinstance(prologue, Activation) and prologue.parts == 1 and not prologue.rotation
    )
    specs = (
        PartitionSpec(m or None, (k or None) if by_elements else None),
        None if residual is None else PartitionSpec(m or None, columns),
        partition_specs(w, spec),
        None if operands[3] is None else PartitionSpec(n or None),
        jax.tree.map(lambda _: PartitionSpec(), prologue),
    )

    def on_device(*operands):
        # A mesh that the caller has set would give the operations here shardings of their own.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return part(*operands)

    def part(x, residual, w, bias, prologue):
        dtype, activation = x.dtype, static.activation
        inner = dataclasses.replace(static, activation=None) if gated else static
        if gated:
            x = x.astype(jnp.float32)  # for the product in float32, which the activation takes
        if k:
            parts = PartsOfK(k, inner.a_format, inner.activation, inner.implementation, x.dtype.name)
            if not by_elements:
                x, prologue = _own_columns(prologue(x), k), None
            size = x.shape[-1]
            y = sum_of_parts(parts, x, None if gated else residual, part_of(w, size, k), bias, prologue)
        else:
            y = product(inner, x, None if gated else residual, w, bias, prologue)
        if not gated:
            return y
        y = jax.lax.all_gather(y, n, axis=1, tiled=True)
        return epilogue.activate_and_add(y, activation, dtype, residual)

    named = jax.tree.map(lambda leaf: NamedSharding(mesh, leaf), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return mesh, on_device, NamedSharding(mesh, PartitionSpec(m or None, columns)), named


def _own_columns(rows: Float[Array, "m k"], axes: tuple[str, ...]) -> Float[Array, "m part"]:
    """This device's part of whole rows."""
    size = rows.shape[1] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axes) * size, size, axis=1)


def _axes_of_weights(w: BipolarArray | UnpackedArray, mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that n and k are cut over, as far as the codes are."""
    if isinstance(w, BipolarArray):
        return tuple(_axes(w.planes, mesh)[-2:])
    groups, n, size = _axes(w.signed_codes, mesh)
    return n, groups if w.signed_codes.shape[0] > 1 else size


def _axes(array: Any, mesh: Mesh) -> list[tuple[str, ...]]:
    """Mesh axes of each axis of an array."""
    sharding = array.sharding
    if sharding is None:  # of a constant
        return [()] * array.ndim
    if isinstance(sharding, NamedSharding):
        axes: list[MeshAxes] = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
        return [(names,) if isinstance(names, str) else tuple(names or ()) for names in axes]
    parts = sharding.devices_indices_map(array.shape)
    first, found = parts[mesh.devices.flat[0]], [()] * array.ndim
    for place, name in enumerate(mesh.axis_names):
        if mesh.devices.shape[place] > 1:
            following = parts[mesh.devices.take([1], axis=place).flat[0]]
            found = [
                (*names, name) if one != other else names
                for names, one, other in zip(found, first, following, strict=True)
            ]
    return found
