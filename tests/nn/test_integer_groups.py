"""Layers and models with integer groups: conversion, training, joining, files."""

from __future__ import annotations

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.nn.layers.joined import joined
from tests.support.integer_products import normal

PRECISION = bj.Precision.parse("W4A8g16")


class Two(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **options):
        self.first = nnx.Linear(32, 32, rngs=rngs, **options)
        self.second = nnx.Linear(32, 32, rngs=rngs, **options)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    return bj.quantize_model(Two(nnx.Rngs(0)), [(".*", PRECISION)])


def test_quantize_model_gives_integer_groups(model):
    kernel = model.first.kernel.get_value()
    expected = bj.quantize(Two(nnx.Rngs(0)).first.kernel[...], 4, 0, 16, scales="integer")
    jax.tree.map(np.testing.assert_array_equal, kernel, expected)
    assert model.first.precision == PRECISION
    assert str(model.first.precision) == "W4A8g16"


def test_layers_with_integer_groups_join(model):
    both = joined([model.first, model.first])
    x = normal(3, 32)
    np.testing.assert_array_equal(both(x), jnp.concatenate([model.first(x)] * 2, axis=-1))
    floats = bj.quantize_model(Two(nnx.Rngs(0)), [(".*", "W4A8g16f")])
    with pytest.raises(ValueError, match="precision is W4A8g16 in one and W4A8g16f in another"):
        joined([model.first, floats.first])


def test_a_layer_trains_with_the_integers_that_it_is_packed_with():
    """Forward values are those of the packed layer to the bit; the gradient is straight-through."""
    dot_general = bj.DotGeneral.of(PRECISION)
    assert dot_general.precision == PRECISION
    trained = Two(nnx.Rngs(0), dot_general=dot_general)
    x = normal(3, 32)
    packed = bj.quantize_model(trained)
    np.testing.assert_array_equal(packed(x), trained(x))
    kernel = packed.first.kernel.get_value()
    np.testing.assert_allclose(
        kernel.dequantize(), bj.fake_quant(trained.first.kernel[...], 4, 0, 16, scales="integer"), atol=1e-6
    )
    weights = trained.second.kernel[...]
    dot = lambda w: jnp.sum(dot_general(jnp.ones((2, 32)), w, (((1,), (0,)), ((), ()))))  # noqa: E731
    np.testing.assert_allclose(jax.grad(dot)(weights), 2 * jnp.ones_like(weights))


@pytest.mark.usefixtures("standard_promotion")  # optax promotes
def test_learned_groups_are_trained_and_packed():
    """Training begins with the integers that `quantize` finds, and moves S, s and o; the packed layer has them."""
    trained = bj.quantization_aware(Two(nnx.Rngs(0)), [(".*", PRECISION)], learned_steps=True)
    expected = bj.quantize(trained.first.kernel[...], 4, 0, 16).groups
    before = trained.first.dot_general.step_size[...]
    assert before.shape == (32, 1 + 2 * 2)
    jax.tree.map(np.testing.assert_array_equal, bj.quantize_model(trained).first.kernel.get_value().groups, expected)
    x, y = normal(64, 32), normal(64, 32, seed=1)
    optimizer = nnx.Optimizer(trained, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(trained, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(trained)
        optimizer.update(trained, gradients)
        return loss

    losses = [float(step(trained, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    packed = bj.quantize_model(trained)
    np.testing.assert_array_equal(packed(x), trained(x))
    kernel, moved = packed.first.kernel.get_value(), trained.first.dot_general.step_size[...]
    assert packed.first.learned_steps
    for part in (np.s_[:, :1], np.s_[:, 1:3], np.s_[:, 3:]):
        assert np.mean(np.asarray(moved[part] != before[part])) > 0.9
    assert np.any(kernel.groups.scale != expected.scale)
    fake = trained.first.dot_general.dot_general.fake_quant(trained.first.kernel[...], moved)
    np.testing.assert_array_equal(kernel.dequantize(), fake)
    with pytest.raises(ValueError, match=r"step sizes have shape \(32, 2\), weights \(32, 32\) need \(32, 5\)"):
        bj.DotGeneral.of(PRECISION).pack(normal(32, 32), np.ones((32, 2), np.float32))


def test_state_dicts_and_restored_leaves_keep_integer_groups(model):
    kernel = model.first.kernel.get_value()
    state = flax.serialization.to_state_dict(kernel)
    assert set(state["groups"]) == {"scale", "offset"}
    back = flax.serialization.from_bytes(kernel, flax.serialization.to_bytes(kernel))
    jax.tree.map(np.testing.assert_array_equal, back, kernel)
    state.pop("groups")
    with pytest.raises(ValueError, match=r"groups\.scale"):
        flax.serialization.from_state_dict(kernel, state)
    leaves = [getattr(kernel, name) for name in ("planes", "scale", "offset", "row_sums")]
    restored = model.first.kernel.replace([*leaves, {"scale": kernel.groups.scale, "offset": kernel.groups.offset}])
    jax.tree.map(np.testing.assert_array_equal, restored.get_value(), kernel)
