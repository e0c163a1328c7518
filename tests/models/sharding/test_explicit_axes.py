"""Transformers beside meshes of Explicit axes, which `jax.make_mesh` makes unless it is told otherwise."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bipolar_jax.models import generate, perplexity, shard_model
from tests.models.sharding.test_sharded_transformer import model_of
from tests.models.sharding.test_training import student

MESH = jax.make_mesh((2,), ("data",))
IDS = np.arange(8, dtype=np.int32).reshape(2, 4)


@pytest.fixture(scope="module")
def model():
    return model_of("W4A8")


def test_texts_may_be_cut_over_explicit_axes(model):
    ids = jax.device_put(IDS, jax.NamedSharding(MESH, P("data")))
    found = model(ids)
    assert jax.typeof(found).sharding.spec == P("data", None, None)
    np.testing.assert_array_equal(found, model(IDS))
    with pytest.raises(ValueError, match=r"no sharding on the Explicit axes \{'data': 2\}: give shard_model the mesh"):
        model.prefill(ids, np.array([4, 4]), 8)


def test_a_mesh_that_is_set_changes_no_model(model):
    """Of a cut model, and of one on one device, whose products XLA distributes without names of axes."""
    expected = model(IDS)
    with jax.set_mesh(MESH):
        np.testing.assert_array_equal(shard_model(model, MESH)(IDS), expected)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        np.testing.assert_array_equal(model(IDS), expected)


@pytest.mark.covered("the tests above, by the same context")
@pytest.mark.parametrize("is_cut", [True, False])
def test_texts_are_written_and_scored_where_a_mesh_is_set(model, is_cut):
    model = shard_model(model, MESH) if is_cut else model

    def results():
        scored = perplexity(model, np.arange(24) % 48, windows=2, window_length=8, windows_per_step=2)
        return generate(model, [[1, 2], [3]], 3, end_ids=()), scored

    expected = results()
    with jax.set_mesh(MESH):
        assert results() == expected


@pytest.mark.covered("the tests above; products and gradients, by ops/test_explicit_meshes.py")
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_training_on_explicit_axes(sizes):
    mesh = jax.make_mesh(sizes, ("data", "model"))
    graph, state = nnx.split(student())

    def loss(state, ids):
        logits = nnx.merge(graph, state)(ids)[:, :-1]
        return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(ids[:, 1:], logits.shape[-1])).sum(axis=-1).mean()

    def placed(leaf):  # columns of all kernels, also of o and down, whose tokens are then gathered
        axes = [*[None] * (leaf.ndim - 1), "model"] if leaf.ndim == 3 else []
        return jax.device_put(leaf, jax.NamedSharding(mesh, P(*axes)))

    step = jax.jit(jax.value_and_grad(loss))
    expected, gradients = step(state, IDS)
    cut = jax.tree.map(placed, state)
    found, ours = step(cut, jax.device_put(IDS, jax.NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for leaf, one, other in zip(*map(jax.tree.leaves, (cut, ours, gradients)), strict=True):
        assert jax.typeof(one).sharding.spec == jax.typeof(leaf).sharding.spec
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
