"""A Transformer block by block: the laws of `nn.compressible`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.nn.compressible import Compressible, layer_at
from tests.support.tiny_transformers import (
    ARCHITECTURES,
    CONFIG,
    NEWER_ARCHITECTURES,
    random_ids,
    random_transformer,
)

ALL = ARCHITECTURES | NEWER_ARCHITECTURES
PACKED = [("^layers/", bj.Precision(4, 8))]


def block_by_block(model, ids):
    """Hidden states after the last norm, by the protocol."""
    enter, run = jax.jit(lambda model, ids: model.enter_blocks(ids)), jax.jit(type(model).run_block)
    carry = enter(model, ids)
    for index in range(model.num_blocks):
        carry = run(model, model.block(index), carry)
    return model.leave_blocks(model.stream(carry))


@pytest.mark.sample(2)
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("form", ["float", "packed", "joined", "rotated"])
def test_blocks_one_by_one_are_the_model(config, form):
    model = random_transformer(config)
    if form == "rotated" and not config.post_norms:  # which cannot be
        model = bj.compress.rotate(model, key=jax.random.key(0))
    if form in ("packed", "joined"):
        model = bj.quantize_model(model, PACKED)
    if form == "joined":
        model = join_projections(model)
    ids = random_ids(2, 7)
    expected = model.hidden_states(ids)
    tolerance = 1e-5 if form in ("float", "rotated") else 2e-2  # a number may round to the next step of a quantizer
    np.testing.assert_allclose(block_by_block(model, ids), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_sites_are_all_linear_layers_of_a_block(config):
    model = random_transformer(config)
    assert isinstance(model, Compressible)
    block = model.block(0)
    named = [name for sites in model.block_sites for name in sites.names]
    linear = ["/".join(path) for path, layer in nnx.iter_modules(block) if isinstance(layer, nnx.Linear)]
    assert sorted(named) == sorted(linear)
    for sites in model.block_sites:
        assert len({layer_at(block, name).in_features for name in sites.names}) == 1
        assert sites.to_stream == (sites.names[0] in ("attention/o_proj", "ffn/down_proj"))


def test_a_model_with_its_own_blocks_is_the_same():
    model = random_transformer(CONFIG)
    again = model.with_blocks([model.block(index) for index in range(model.num_blocks)])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(again), nnx.state(model)))


def test_blocks_may_become_packed():
    model = random_transformer(CONFIG)
    packed = bj.quantize_model(model, PACKED)
    again = model.with_blocks([packed.block(index) for index in range(packed.num_blocks)])
    ids = random_ids(1, 5)
    np.testing.assert_array_equal(again(ids), packed(ids))
    assert isinstance(model.block(0).ffn.down_proj, nnx.Linear)


def test_blocks_that_do_not_fit_are_refused():
    model = random_transformer(CONFIG)
    blocks = [model.block(index) for index in range(3)]
    with pytest.raises(ValueError, match="3 blocks, got 2"):
        model.with_blocks(blocks[:2])
    with pytest.raises(IndexError, match="blocks 0 to 2, not 3"):
        model.block(3)
    with pytest.raises(ValueError, match="has no 'r_proj', of the path 'attention/r_proj'"):
        layer_at(blocks[0], "attention/r_proj")
