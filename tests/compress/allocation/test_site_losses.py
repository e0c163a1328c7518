"""Losses of sites, on a model of two products: by their definition, and on a mesh of two devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.compress.allocation import site_losses
from bipolar_jax.nn import Linear
from bipolar_jax.nn.compressible import Sites

HIDDEN, VOCABULARY = 32, 24
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 5)).astype(np.int32)


class Block(nnx.Module):
    def __init__(self, up: nnx.Module):
        self.up = up


class Tiny(nnx.Module):
    """Embeds, adds a product in each block, and multiplies by the embedding."""

    block_sites = (Sites(("up",), to_stream=True),)
    num_blocks = 2

    def __init__(self, layers: list[nnx.Module], table: jax.Array):
        self.blocks, self.table = nnx.List([Block(layer) for layer in layers]), nnx.Param(table)

    def block(self, index: int) -> nnx.Module:
        return nnx.clone(self.blocks[index])

    def enter_blocks(self, ids: jax.Array) -> jax.Array:
        return self.table[...][ids]

    def run_block(self, block: nnx.Module, carry: jax.Array) -> jax.Array:
        return carry + block.up(carry)

    def predict(self, carry: jax.Array) -> jax.Array:
        return carry @ self.table[...].T


@pytest.fixture(scope="module")
def layers():
    rngs = nnx.Rngs(0)
    return [nnx.Linear(HIDDEN, HIDDEN, use_bias=False, rngs=rngs) for _ in range(Tiny.num_blocks)]


@pytest.fixture(scope="module")
def models(layers):
    """The float model, and it at 2 and at 5 bits."""
    table = jax.random.normal(jax.random.key(1), (VOCABULARY, HIDDEN), jnp.float32)
    packed = [[Linear.from_float(layer, precision) for layer in layers] for precision in ("W2A8", "W5A8")]
    return [Tiny(each, table) for each in (layers, *packed)]


def test_losses_are_divergences_from_the_float_model_on_any_number_of_devices(models, layers):
    floats, *options = models
    found = site_losses(floats, options, TOKENS, windows_per_step=4)
    assert found.shape == (2, 1, 2)
    assert (found[..., 1] < found[..., 0] / 10).all()

    def log_probabilities(first, second):
        x = floats.enter_blocks(TOKENS)
        x = x + first(x)
        return jax.nn.log_softmax(floats.predict(x + second(x)))

    wanted = log_probabilities(*layers)
    with_second_packed = log_probabilities(layers[0], options[0].block(1).up)
    expected = (np.exp(wanted) * (wanted - with_second_packed)).sum(-1).mean()
    np.testing.assert_allclose(found[1, 0, 0], expected, rtol=1e-3)
    mesh = jax.make_mesh((1, 2), ("data", "model"))
    np.testing.assert_allclose(site_losses(floats, options, TOKENS, windows_per_step=4, mesh=mesh), found, rtol=1e-3)


def test_windows_that_do_not_divide_over_devices_are_refused(models):
    floats, *options = models
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.raises(ValueError, match="a step of 3 windows does not divide over 2 devices: .* the 6 windows"):
        site_losses(floats, options, TOKENS, windows_per_step=3, mesh=mesh)
