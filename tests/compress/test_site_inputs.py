"""Inputs of layers within a block: they put together the block again, and nothing else is computed for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.compress.site_inputs import replace_layer, site_inputs
from bipolar_jax.models.blocks.norm import normalize
from bipolar_jax.nn import Linear
from bipolar_jax.nn.compressible import Sites, layer_at
from tests.support.tiny_transformers import ARCHITECTURES, random_ids, random_transformer

inputs = jax.jit(site_inputs, static_argnames="sites")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inputs_and_streams_put_the_block_together(name):
    model = random_transformer(ARCHITECTURES[name])
    block, carry = model.block(1), model.enter_blocks(random_ids(2, 7))
    of_heads, of_o, of_up, of_down = (inputs(model, block, carry, model.block_sites[i:]) for i in range(4))
    for found, expected in (
        (of_heads[0], normalize(block.attention_norm, carry.hidden)),
        (of_heads[1], carry.hidden),
        (of_o[1], carry.hidden),
        (of_up[0], normalize(block.ffn_norm, of_up[1])),
        (of_down[1], of_up[1]),
        (of_up[1], of_o[1] + block.attention.o_proj(of_o[0])),
        (model.run_block(block, carry).hidden, of_down[1] + block.ffn.down_proj(of_down[0])),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_inputs_are_those_behind_packed_layers():
    model = random_transformer(ARCHITECTURES["llama"])
    block, carry = model.block(0), model.enter_blocks(random_ids(2, 7))
    sites = model.block_sites[1:]
    before = inputs(model, block, carry, sites)[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        replace_layer(block, f"attention/{name}", Linear.from_float(layer_at(block, f"attention/{name}"), "W2A8"))
    after = inputs(model, block, carry, sites)[0]
    assert np.abs(np.asarray(after - before)).max() > 0.05


def test_only_what_an_input_depends_on_is_computed():
    model = random_transformer(ARCHITECTURES["llama"])
    block, carry = model.block(0), model.enter_blocks(random_ids(2, 7))

    def products(sites):
        return inputs.lower(model, block, carry, sites).compile().as_text().count(" dot(")

    heads, o, up, down = (products(model.block_sites[i:]) for i in range(4))
    assert heads == 0
    assert 0 < o < up < down
    whole = jax.jit(type(model).run_block).lower(model, block, carry).compile().as_text().count(" dot(")
    assert down < whole + 1


def test_a_site_that_is_not_run_or_not_there_is_named():
    model = random_transformer(ARCHITECTURES["llama"])
    block, carry = model.block(0), model.enter_blocks(random_ids(1, 3))
    with pytest.raises(ValueError, match="no 'qkv_proj'"):
        site_inputs(model, block, carry, [Sites(("attention/qkv_proj",), to_stream=False)])
    block.spare = block.attention.o_proj
    block.attention.o_proj = jax.tree.map(jnp.copy, block.attention.o_proj)
    with pytest.raises(ValueError, match="the block, a DecoderLayer, does not run spare"):
        site_inputs(model, block, carry, [Sites(("spare",), to_stream=False)])
