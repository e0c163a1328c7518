"""The optimizer tells kernels, embeddings, norms and learned steps apart, in every form of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.nn import adamw


def nested(kinds):
    """Parameters of ones, as linen keeps them."""
    return {"layer": {kind: jnp.ones((2, 2)) for kind in kinds}}


@pytest.mark.parametrize("decay_embeddings", [False, True])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.sample(2)
def test_kernels_decay_and_steps_have_their_own_rate(flat, decay_embeddings):
    params = nested(["kernel", "embedding", "scale", "bias", "step_size"])
    if flat:
        params = {f"layer/{kind}": value for kind, value in params["layer"].items()}
    rate, decay = 1e-2, 0.5
    optimizer = adamw(rate, weight_decay=decay, clip_norm=1e9, decay_embeddings=decay_embeddings, step_size_rate=0.25)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    found = {
        jax.tree_util.keystr(path): float(leaf[0, 0]) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    decayed = -rate * (1 + decay)
    expected = {"kernel": decayed, "embedding": decayed if decay_embeddings else -rate, "scale": -rate, "bias": -rate}
    for kind, update in (expected | {"step_size": -0.25 * rate}).items():
        (key,) = (key for key in found if kind in key)
        np.testing.assert_allclose(found[key], update, rtol=1e-5)


def test_nnx_models_train_with_it():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    student = bj.quantization_aware(model, [(".*", bj.Precision.parse("W2A4"))], learned_steps=True)
    optimizer = nnx.Optimizer(student, adamw(1e-2, weight_decay=0.5, step_size_rate=0.0), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(student, nnx.Param))
    optimizer.update(student, jax.tree.map(jnp.zeros_like, before))
    layer, old = student.layers[0], before["layers"][0]
    np.testing.assert_allclose(layer.kernel[...], old["kernel"].get_value() * (1 - 0.5e-2), rtol=1e-6)
    np.testing.assert_array_equal(layer.bias[...], old["bias"].get_value())
    np.testing.assert_array_equal(layer.dot_general.step_size[...], old["dot_general"]["step_size"].get_value())


def test_gradients_are_clipped_by_their_global_norm():
    optimizer, params = adamw(1.0, clip_norm=1.0), nested(["kernel", "bias"])
    _, state = optimizer.update(jax.tree.map(lambda leaf: 100 * leaf, params), optimizer.init(params), params)
    averages = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(averages)) == pytest.approx(0.1, rel=1e-5)
