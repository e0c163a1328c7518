"""Models are read from files straight into the devices of a mesh, and written from there."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bipolar_jax.models import PretrainedModel, load_model, load_sharded, save_model
from bipolar_jax.models.sharding import load
from bipolar_jax.models.sharding.load import load_placed
from tests.models.sharding.test_sharded_transformer import model_of
from tests.support.tiny_checkpoints import make_tokenizer

MESH = jax.make_mesh((2,), ("model",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tokenizer = make_tokenizer("smollm")
    model = model_of("W4A8g32", vocab_size=tokenizer.get_vocab_size())
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save_model(path, PretrainedModel(model, tokenizer))
    return path, model


def test_arrays_are_read_into_their_shards(saved, tmp_path):
    path, model = saved
    placed = load_placed(path, MESH)
    o_proj = placed.model.layers.attention.o_proj.kernel.get_value()
    assert o_proj.planes.sharding.spec == P(None, None, None, "model")
    assert o_proj.groups.scale.sharding.spec == P(None, None, "model")
    assert placed.model.layers.ffn.up_proj.kernel.get_value().planes.sharding.spec == P(None, None, "model", None)
    for one, other in zip(jax.tree.leaves(placed.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)
    save_model(tmp_path / "again", placed)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_random_models_are_drawn_into_their_shards(saved):
    _, model = saved
    place = functools.partial(load._shardings, load.two_axes(MESH))
    drawn = model_of("W4A8g32", vocab_size=model.config.vocab_size, place=place)
    planes = drawn.layers.attention.o_proj.kernel.get_value().planes
    assert planes.sharding.spec == P(None, None, None, "model")
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_fewer_bits_are_read_into_shards(saved):
    path, _ = saved
    expected = load_model(path, bits=2).model
    for one, other in zip(*map(jax.tree.leaves, (load_placed(path, MESH, bits=2).model, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.covered("tests of shard_model, and those above")
def test_a_loaded_model_computes_what_one_device_does(saved):
    path, model = saved
    sharded = load_sharded(path, MESH)
    ids = np.arange(8, dtype=np.int32).reshape(2, 4)
    np.testing.assert_allclose(sharded.model(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_a_mesh_that_does_not_fit_is_refused_before_the_weights_are_read(tmp_path):
    tokenizer = make_tokenizer("smollm")
    odd = model_of(num_heads=1, num_kv_heads=1, ffn_size=32, vocab_size=tokenizer.get_vocab_size())
    save_model(tmp_path / "odd", PretrainedModel(odd, tokenizer))
    with pytest.raises(ValueError, match="the model cannot be cut over 2 devices: attention .* 1 heads do not divide"):
        load_placed(tmp_path / "odd", MESH)
