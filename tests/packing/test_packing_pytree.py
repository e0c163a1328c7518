"""`BipolarArray` as a pytree: JAX transformations, sharding, and Flax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bipolar_jax import TERNARY, BipolarArray, matmul, quantize
from bipolar_jax.nn import Packed
from tests.support.integer_products import normal


@pytest.fixture(scope="module")
def stack() -> BipolarArray:
    """Three matrices [40, 6]."""
    return quantize(normal(3, 40, 6), 4, -2, 16, "minmax", scales="float")


def assert_same(one: BipolarArray, other: BipolarArray):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_four_arrays_are_the_leaves(stack):
    assert len(jax.tree.leaves(stack)) == 4
    assert len(jax.tree.leaves(quantize(normal(8, 2), TERNARY, 0))) == 3  # no offset
    assert_same(jax.tree.map(lambda leaf: leaf, stack), stack)


def test_static_attributes_are_part_of_the_tree_structure(stack):
    for change in ({"axis": -1}, {"contracted_size": 39}, {"group_size": 15}, {"format": TERNARY}):
        assert jax.tree.structure(dataclasses.replace(stack, **change)) != jax.tree.structure(stack)


def test_passes_jit_unchanged(stack):
    assert_same(jax.jit(lambda w: w)(stack), stack)


def test_jitted_quantize_equals_quantize(stack):
    # Fused arithmetic may round an offset once instead of twice; the codes must not differ.
    jitted = jax.jit(lambda x: quantize(x, 4, -2, 16, "minmax", scales="float"))(normal(3, 40, 6))
    np.testing.assert_array_equal(jitted.planes, stack.planes)
    np.testing.assert_allclose(jitted.scale, stack.scale, rtol=1e-6)
    np.testing.assert_allclose(jitted.offset, stack.offset, rtol=1e-6, atol=1e-6)


def test_vmap_over_a_stack_sees_matrices(stack):
    def decode(w):
        assert w.shape == (40, 6)
        return w.dequantize()

    np.testing.assert_array_equal(jax.vmap(decode)(stack), stack.dequantize())


def test_vmapped_quantize_makes_a_stack(stack):
    mapped = jax.vmap(lambda x: quantize(x, 4, -2, 16, "minmax", scales="float"))(normal(3, 40, 6))
    assert mapped.shape == (3, 40, 6)
    np.testing.assert_array_equal(mapped.planes, stack.planes)


def test_scan_over_a_stack_sees_matrices(stack):
    _, decoded = jax.lax.scan(lambda carry, w: (carry, w.truncate(2).dequantize()), None, stack)
    np.testing.assert_allclose(decoded, stack.truncate(2).dequantize(), rtol=1e-6, atol=1e-6)  # fused or not


def test_indexing_and_stacking_the_leaves_splits_and_joins_the_batch(stack):
    matrices = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)]
    for matrix in matrices:
        assert matrix.shape == (40, 6)
        matrix.check()
    assert_same(jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices), stack)


def test_eval_shape_has_the_shapes_and_dtypes_of_quantize(stack):
    abstract = jax.eval_shape(lambda: quantize(jnp.ones((3, 40, 6)), 4, -2, 16, "minmax", scales="float"))
    assert isinstance(abstract.planes, jax.ShapeDtypeStruct)
    assert (abstract.shape, abstract.bits, abstract.ndim, abstract.nbytes) == ((3, 40, 6), 4, 3, stack.nbytes)
    abstract.check()
    assert jax.tree.structure(abstract) == jax.tree.structure(stack)
    for ours, real in zip(jax.tree.leaves(abstract), jax.tree.leaves(stack), strict=True):
        assert (ours.shape, ours.dtype) == (real.shape, real.dtype)


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() >= 2  # tests/conftest.py
    return jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))


def test_shard_map_along_n_gives_every_device_an_array(stack, mesh):
    """Two devices hold three columns each; every shard is a consistent `BipolarArray`."""

    def local(x, w):
        assert w.shape == (3, 40, 3)
        w.check()
        return matmul(x, w, 8)

    spec = BipolarArray(P(None, None, "model"), *3 * [P(None, "model")], stack.format, 40, -2, 16)
    x = normal(3, 5, 40)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), spec), out_specs=P(None, None, "model"))
    np.testing.assert_allclose(jax.jit(sharded)(x, stack), matmul(x, stack, 8), rtol=1e-6, atol=1e-6)


def test_a_sharded_array_multiplies_under_jit(stack, mesh):
    first = jax.tree.map(lambda leaf: leaf[0], stack)
    spec = dataclasses.replace(
        first, planes=P(None, "model"), **dict.fromkeys(("scale", "offset", "row_sums"), P("model"))
    )
    placed = jax.tree.map(lambda leaf, p: jax.device_put(leaf, NamedSharding(mesh, p)), first, spec)
    assert len(placed.planes.sharding.device_set) == 2
    x = normal(5, 40)
    np.testing.assert_allclose(
        jax.jit(lambda x, w: matmul(x, w, 8))(x, placed), matmul(x, first, 8), rtol=1e-6, atol=1e-6
    )


def test_sharding_along_the_contracted_axis_raises(mesh):
    w = quantize(normal(64, 6), 4, 0)
    spec = BipolarArray(P(None, None, "model"), P(), None, P(), w.format, 64, -2, None)
    sharded = jax.shard_map(
        lambda x, w: matmul(x, w, 8), mesh=mesh, in_specs=(P(), spec), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match="If they are cut along k, in jax.shard_map, give `matmul` its k_axes"):
        sharded(normal(5, 64), w)


def test_flax_splits_and_merges_it(stack):
    class Holder(nnx.Module):
        def __init__(self):
            self.w = Packed(stack)

    graph, state = nnx.split(Holder())
    assert len(jax.tree.leaves(state)) == 4
    assert_same(nnx.merge(graph, state).w.get_value(), stack)
    doubled = jax.tree.map(lambda leaf: leaf, state)
    assert_same(nnx.merge(graph, doubled).w.get_value(), stack)
    assert jax.tree.leaves(nnx.state(Holder(), nnx.Param)) == []
    assert_same(nnx.jit(lambda module: module.w.get_value())(Holder()), stack)
