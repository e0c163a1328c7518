"""Rotated models have the function of the original, and the weights that plain numpy says."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.compress.rotations.plan import make_plan
from bipolar_jax.compress.rotations.rotate import rotate
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.nn.compressible import Rotatable
from tests.compress.rotations.dense_rotations import dense
from tests.support.tiny_checkpoints import make_tokenizer
from tests.support.tiny_transformers import ARCHITECTURES, CONFIG, random_ids, random_transformer, tied

KEY = jax.random.key(5)
# float32: measured at most 3e-6 of the largest logit.
TOLERANCE = 3e-5
CASES = {
    f"{name}, {'tied' if tie else 'untied'}": tied(config, tie)
    for name, config in ARCHITECTURES.items()
    for tie in (True, False)
}


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.sample(2)
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", ["full", "foldable"])
def test_logits_stay_the_same(config, kind):
    model, ids = random_transformer(config), random_ids(2, 9)
    rotated = rotate(model, kind, key=KEY)
    assert (rotated.config.rotation.ffn is None) == (kind == "foldable")
    assert not jnp.allclose(rotated.layers.attention.o_proj.kernel[...], model.layers.attention.o_proj.kernel[...])
    assert_same(rotated(ids), model(ids))


@pytest.mark.sample(2)
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_prefill_decode_and_text_stay_the_same(config):
    model, ids = random_transformer(config), random_ids(2, 9)
    rotated, lengths = rotate(model, key=KEY), jnp.array([9, 6])
    expected, cache = model.prefill(ids, lengths, 12)
    found, rotated_cache = rotated.prefill(ids, lengths, 12)
    assert_same(found, expected)
    token = random_ids(2, seed=1)
    assert_same(rotated.decode(token, rotated_cache)[0], model.decode(token, cache)[0])
    prompts = [[3, 1, 4], [1, 5]]
    assert generate(rotated, prompts, 4) == generate(model, prompts, 4)


@pytest.mark.sample(1)
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_files_say_how_a_model_is_rotated(config, tmp_path):
    tokenizer = make_tokenizer("smollm")
    model = random_transformer(dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size()))
    rules = [("^layers/", bj.Precision(8, 8)), ("^embed$", bj.Precision(8))]
    packed = bj.quantize_model(rotate(model, key=KEY), rules)
    save_model(tmp_path / "model.safetensors", PretrainedModel(packed, tokenizer, None))
    loaded = load_model(tmp_path / "model.safetensors").model
    assert loaded.config == packed.config
    np.testing.assert_array_equal(loaded(random_ids(1, 5)), packed(random_ids(1, 5)))


def test_weights_of_a_llama_are_those_of_the_papers():
    """QuaRot's and SpinQuant's equations with dense matrices, float64, for the last layer of a model."""
    model = random_transformer(CONFIG)
    rotated = rotate(model, key=KEY)
    of = {path: np.asarray(value.get_value(), np.float64) for path, value in nnx.to_flat_state(nnx.state(model))}
    rotation, heads = rotated.config.rotation, bj.ops.hadamard(CONFIG.head_dim)
    r1, r2, r4 = dense(rotation.stream), dense(heads), dense(rotation.ffn)

    def kernel(block, name):
        return of["layers", block, name, "kernel"][-1]

    g1, g2 = (np.diag(of["layers", name, "scale"][-1]) for name in ("attention_norm", "ffn_norm"))
    expected = {
        "attention/q_proj": r1.T @ g1 @ kernel("attention", "q_proj"),
        "attention/k_proj": r1.T @ g1 @ kernel("attention", "k_proj"),
        "attention/v_proj": r1.T @ g1 @ kernel("attention", "v_proj") @ np.kron(np.eye(CONFIG.num_kv_heads), r2),
        "attention/o_proj": np.kron(np.eye(CONFIG.num_heads), r2.T) @ kernel("attention", "o_proj") @ r1,
        "ffn/gate_proj": r1.T @ g2 @ kernel("ffn", "gate_proj"),
        "ffn/up_proj": r1.T @ g2 @ kernel("ffn", "up_proj"),
        "ffn/down_proj": r4.T @ kernel("ffn", "down_proj") @ r1,
    }
    block = rotated.block(CONFIG.num_layers - 1)
    for path, matrix in expected.items():
        part, name = path.split("/")
        np.testing.assert_allclose(getattr(getattr(block, part), name).kernel[...], matrix, rtol=0, atol=3e-6)
    np.testing.assert_allclose(rotated.embed.embedding[...], of["embed", "embedding"] @ r1, rtol=0, atol=3e-6)
    head = r1.T @ np.diag(of["final_norm", "scale"]) @ of["lm_head", "kernel"]
    np.testing.assert_allclose(rotated.lm_head.kernel[...], head, rtol=0, atol=3e-6)
    for norm in (block.attention_norm, block.ffn_norm, rotated.final_norm):
        np.testing.assert_array_equal(norm.scale[...], np.ones(CONFIG.hidden_size))


def test_outliers_are_spread():
    model = random_transformer(CONFIG)
    model.embed.embedding[...] = model.embed.embedding[...].at[:, 7].mul(100)
    ids = random_ids(1, 9)

    def peak(model):
        stream = model.stream(model.enter_blocks(ids))
        return jnp.max(jnp.abs(stream)) / jnp.sqrt(jnp.mean(stream**2))

    assert peak(rotate(model, key=KEY)) < 0.6 * peak(model)


@pytest.mark.covered("models/inference/test_cache.py")
def test_a_cache_of_4_bits_loses_less():
    """Keys with a large constant in one element, as biases give them."""
    model = random_transformer(dataclasses.replace(ARCHITECTURES["qwen2"], head_dim=32))
    bias = model.layers.attention.k_proj.bias
    bias[...] = bias[...].at[:, 3].set(20.0)
    rotated, prompts, lengths = rotate(model, key=KEY), random_ids(4, 9), jnp.full(4, 9)

    def cache_and_logits(model, cache_bits):
        _, cache = model.prefill(prompts, lengths, 12, cache_bits)
        return cache, model.decode(random_ids(4, seed=1), cache)[0]

    exact_cache, exact = cache_and_logits(model, None)
    assert rotated.config.key_rotation(None) is rotated.config.key_rotation(8) is None
    cache, logits = cache_and_logits(rotated, 4)
    other_cache, other_logits = cache_and_logits(model, 4)
    keys = cache.key_rotation.undo(cache.keys.dequantize())
    distances = [jnp.linalg.norm((x - exact_cache.keys)[..., :9, :]) for x in (keys, other_cache.keys.dequantize())]
    assert distances[0] < 0.75 * distances[1]
    assert jnp.linalg.norm(logits - exact) < 0.7 * jnp.linalg.norm(other_logits - exact)


def test_shards_keep_their_numbers():
    model = random_transformer(CONFIG)
    rotated = rotate(model, key=KEY, shards=5)
    assert rotated.config.rotation.ffn == bj.ops.Hadamard((4,), 5)
    ids = random_ids(1, 9)
    assert_same(rotated(ids), model(ids))
    with pytest.raises(ValueError, match="20 numbers cannot be divided into 3"):
        rotate(model, key=KEY, shards=3)
    assert make_plan(model, "full", KEY, block=2).rotation.ffn == bj.ops.Hadamard((2,), 10)
    with pytest.raises(ValueError, match="20 numbers cannot be rotated in blocks of 8"):
        rotate(model, key=KEY, block=8)


def test_none_is_the_model_and_keys_give_signs():
    model = random_transformer(CONFIG)
    assert rotate(model, "none", key=KEY) is model
    signs = [rotate(model, "foldable", key=jax.random.key(seed)).config.rotation.stream.signs for seed in (0, 0, 1)]
    assert signs[0] == signs[1] != signs[2]


def test_joined_layers_rotate_too():
    packed = bj.quantize_model(rotate(random_transformer(CONFIG), key=KEY), [("^layers/", bj.Precision(8, 8))])
    joined, ids = join_projections(packed), random_ids(1, 9)
    assert hasattr(joined.layers.ffn, "gate_up_proj")
    expected = packed(ids)
    # Quantized inputs may round to the next step.
    np.testing.assert_allclose(joined(ids), expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_bfloat16_models_stay_bfloat16():
    rotated = rotate(random_transformer(CONFIG, dtype=jnp.bfloat16), key=KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(rotated))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(lambda model: model.hidden_states(random_ids(1, 5)), rotated).dtype == jnp.bfloat16


def test_what_cannot_be_rotated_is_refused_by_name():
    model = random_transformer(CONFIG)
    with pytest.raises(ValueError, match="rotation must be one of full, foldable, none, got 'half'"):
        rotate(model, "half", key=KEY)
    with pytest.raises(ValueError, match="key must be a PRNG key such as jax.random.key"):
        rotate(model, key=0)
    with pytest.raises(ValueError, match="is rotated already"):
        rotate(rotate(model, key=KEY), key=KEY)
    with pytest.raises(ValueError, match="attention/q_proj is a Linear, not a float nnx.Linear"):
        rotate(bj.quantize_model(model, [("^layers/", bj.Precision(4, 8))]), key=KEY)
    with pytest.raises(ValueError, match="a Linear does not say where its residual stream is"):
        rotate(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), key=KEY)
    without = random_transformer(dataclasses.replace(ARCHITECTURES["opt"], qkv_bias=False))
    with pytest.raises(ValueError, match="a norm with a bias precedes a layer without one"):
        rotate(without, key=KEY)


def test_a_norm_behind_a_block_is_refused():
    model = random_transformer(CONFIG)
    *others, down = model.block_sites
    behind = types.SimpleNamespace(
        block=model.block,
        block_sites=(*others, dataclasses.replace(down, output_norm="ffn_norm")),
        rotation=None,
    )
    with pytest.raises(ValueError, match="the norm ffn_norm follows ffn/down_proj"):
        make_plan(behind, "full", KEY)


def test_a_transformer_is_rotatable():
    assert isinstance(random_transformer(CONFIG), Rotatable)
