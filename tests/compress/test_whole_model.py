"""Calibration of NNX models that say nothing of themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.compress.calibrate import calibrate
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.compress.site_inputs import site_inputs
from bipolar_jax.compress.whole_model import WholeModel


class Encoder(nnx.Module):
    """Attention of Flax's own, two branches of one input in a list, a layer that runs twice, one with two paths."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.branches = nnx.List([nnx.Linear(16, 24, rngs=rngs), nnx.Linear(16, 24, rngs=rngs)])
        self.twice = nnx.Linear(24, 24, rngs=rngs)
        self.out = nnx.Linear(24, 8, rngs=rngs)
        self.tied = self.also = nnx.Linear(8, 8, rngs=rngs)
        self.unused = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, shift):
        x = x + self.attention(x)
        x = x + shift[:, None]
        one, other = (branch(x) for branch in self.branches)
        x = self.twice(self.twice(nnx.relu(one) * other))
        return self.also(self.tied(self.out(x)))


def data(count, seed=0):
    """Numbers of few directions, as in real models."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((4, 16))
    x = rng.standard_normal((count, 6, 4)) @ mixing + 0.1 * rng.standard_normal((count, 6, 16))
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.standard_normal((count, 16)), jnp.float32)


METHOD = Rounding(descent_passes=0)
RULES = [("unused", None), ("out", "W8A8"), (".*", "W4A8")]


@pytest.fixture(scope="module")
def model():
    return Encoder(nnx.Rngs(0))


def test_layers_are_found_in_the_order_in_which_they_run(model):
    found = [sites.names for sites in WholeModel.of(model, data(2)).block_sites]
    heads = ("attention/query", "attention/key", "attention/value")
    assert found == [heads, ("attention/out",), ("branches/0", "branches/1"), ("twice",), ("out",)]


@pytest.mark.covered("test_a_layer_that_runs_again_is_rounded_for_what_it_gets_then")
def test_a_model_that_says_nothing_of_itself_is_calibrated(model, tmp_path):
    packed = calibrate(model, data(50), RULES, windows_per_step=20, store=tmp_path, method=METHOD)
    assert isinstance(packed.attention.out, bj.nn.Linear)
    assert [str(layer.precision) for layer in (packed.branches[1], packed.out)] == ["W4A8", "W8A8"]
    assert packed.tied is packed.also
    assert str(packed.tied.precision) == "W4A8"
    assert isinstance(packed.unused, nnx.Linear)
    wanted, rounded, found = (each(*data(30, 1)) for each in (model, bj.quantize_model(model, RULES), packed))
    assert jnp.mean((found - wanted) ** 2) < 0.8 * jnp.mean((rounded - wanted) ** 2)
    again = calibrate(model, data(50), RULES, windows_per_step=20, store=tmp_path, method=METHOD)
    for one, other in zip(*(jax.tree.leaves(nnx.state(each)) for each in (packed, again)), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


class Rematerialized(nnx.Module):
    """A layer within `nnx.remat`, one beside it, numbers and kernels of layers that the model reads, and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.inside, self.beside, self.read = (nnx.Linear(16, 16, rngs=rngs) for _ in range(3))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        inside = nnx.remat(lambda layer, x: layer(x))(self.inside, x)
        return self.dropout(self.beside(inside / self.beside.in_features)) @ self.read.kernel[...]


def test_layers_whose_inputs_cannot_be_read_are_named(tmp_path):
    model = Rematerialized(nnx.Rngs(0))
    model.eval()
    x, _ = data(4)
    rules = [("inside|beside", "W4A8")]
    with pytest.warns(UserWarning, match="^inside: rounded without data, because the model runs them within nnx.jit"):
        packed = calibrate(model, x, rules, method=Rounding("nearest"), store=tmp_path)
    assert isinstance(packed.beside, bj.nn.Linear)
    rounded = bj.quantize_model(model, rules)
    same = [
        all(map(np.array_equal, *(jax.tree.leaves(layer.kernel.get_value()) for layer in layers)))
        for layers in ((packed.inside, rounded.inside), (packed.beside, rounded.beside))
    ]
    assert same == [True, False]


class Recurrent(nnx.Module):
    """Layers in a dict with numbers as keys: one runs again on what it put out, one on inputs of two ranks."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.data({0: nnx.Linear(16, 16, rngs=rngs), 1: nnx.Linear(16, 16, rngs=rngs)})

    def __call__(self, x):
        for _ in range(2):
            x = x + jnp.tanh(self.layers[0](x))
        return self.layers[1](x[:, None])[:, 0] + self.layers[1](x)


def test_a_layer_that_runs_again_is_rounded_for_what_it_gets_then():
    model, x = Recurrent(nnx.Rngs(0)), data(4)[1]
    whole = WholeModel.of(model, (x,))
    assert [sites.names for sites in whole.block_sites] == [("layers/0",), ("layers/1",)]
    again = x + jnp.tanh(model.layers[0](x))
    last = again + jnp.tanh(model.layers[0](again))
    for index, rows in enumerate(((x, again), (last, last))):
        found, _ = jax.jit(site_inputs, static_argnums=3)(whole, model, (x,), whole.block_sites[index:])
        np.testing.assert_allclose(found, jnp.concatenate(rows), rtol=1e-5, atol=1e-5)
    packed = calibrate(model, x, [(".*", "W8A8")], method=Rounding("nearest"))
    assert [str(layer.precision) for layer in packed.layers.values()] == ["W8A8", "W8A8"]


def test_models_in_training_mode_are_warned_of():
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    x, _ = data(4)
    with pytest.warns(UserWarning, match="^layers/0: in training mode, so that layers are rounded for numbers"):
        calibrate(model, x, [("", None)])


def test_examples_must_fit(model):
    x, shift = data(4)
    with pytest.raises(ValueError, match="needs at least 1 window"):
        calibrate(model, (x, shift[:3]), RULES)
