"""The Transformer against a second one, in numpy float64 and loops, written from the papers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.models.blocks.rope import rope_frequencies
from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.models.transformer import Transformer
from tests.support.tiny_transformers import CONFIG, random_ids, random_transformer

CASES = {
    "grouped": CONFIG,
    "tied, one key head": dataclasses.replace(CONFIG, num_kv_heads=1, tie_embeddings=True),
    "qkv bias, no groups": dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=4, qkv_bias=True, norm_eps=1e-2),
    "yarn": dataclasses.replace(CONFIG, rope_scaling=RopeScaling("yarn", 4.0, 16, beta_fast=2.0)),
}
# float32 against float64: measured at most 6e-7 of the largest logit over all cases and six seeds.
ROUNDING = 6e-6

forward = jax.jit(lambda model, ids: model(ids))
prefill = jax.jit(lambda model, ids, lengths, capacity: model.prefill(ids, lengths, capacity), static_argnums=3)
decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache))


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def model(request) -> Transformer:
    return random_transformer(request.param)


@pytest.fixture(scope="module")
def grouped() -> Transformer:
    return random_transformer(CONFIG)


def assert_same_logits(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


# The second Transformer: one text, float64, no batch.


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """Zhang and Sennrich 2019, arXiv 1910.07467."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rope(head: np.ndarray, config: TransformerConfig) -> np.ndarray:
    """Pairs (i, i + d/2) of a [length, d] head turned by position times frequency."""
    frequencies, factor = rope_frequencies(config)  # these have their own tests
    angles = np.outer(np.arange(len(head)), frequencies)
    pairs = head[:, : len(frequencies)] + 1j * head[:, len(frequencies) :]
    turned = factor * np.exp(1j * angles) * pairs
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal softmax attention of one head, query by query."""
    rows = []
    for position, query in enumerate(q):
        scores = k[: position + 1] @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        rows.append(weights / weights.sum() @ v[: position + 1])
    return np.stack(rows)


def numpy_logits(model: Transformer, ids: np.ndarray) -> np.ndarray:
    config = model.config
    parameters = {
        "/".join(map(str, path)): np.asarray(variable[...], np.float64)
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    x = parameters["embed/embedding"][ids]
    for layer in range(config.num_layers):
        p = {path.removeprefix("layers/"): array[layer] for path, array in parameters.items() if "layers/" in path}

        def heads(y, name, p=p):
            y = y @ p[f"attention/{name}_proj/kernel"]
            if config.qkv_bias:
                y = y + p[f"attention/{name}_proj/bias"]
            return np.split(y, y.shape[-1] // config.head_dim, axis=-1)

        y = rms_norm(x, p["attention_norm/scale"], config.norm_eps)
        keys, values = [rope(k, config) for k in heads(y, "k")], heads(y, "v")
        contexts = []
        for index, query in enumerate(heads(y, "q")):
            shared = index * config.num_kv_heads // config.num_heads  # consecutive queries share a key head
            contexts.append(attend(rope(query, config), keys[shared], values[shared]))
        x = x + np.concatenate(contexts, axis=-1) @ p["attention/o_proj/kernel"]
        y = rms_norm(x, p["ffn_norm/scale"], config.norm_eps)
        gate = y @ p["ffn/gate_proj/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p["ffn/up_proj/kernel"])) @ p["ffn/down_proj/kernel"]
    x = rms_norm(x, parameters["final_norm/scale"], config.norm_eps)
    return x @ (parameters["embed/embedding"].T if config.tie_embeddings else parameters["lm_head/kernel"])


def test_forward_is_that_of_the_papers(model):
    ids = random_ids(2, 11)
    logits = forward(model, ids)
    assert logits.dtype == jnp.float32
    for row, expected_ids in zip(logits, ids, strict=True):
        assert_same_logits(row, numpy_logits(model, expected_ids))


def test_hidden_states_and_logits_make_the_forward_pass(grouped):
    ids = random_ids(2, 5)
    assert_same_logits(grouped.logits(grouped.hidden_states(ids)), forward(grouped, ids))


@pytest.mark.parametrize("changed", [1, 5, 10])
def test_a_later_token_leaves_earlier_logits_bit_identical(grouped, changed):
    ids = random_ids(1, 11)
    other = ids.copy()
    other[0, changed] = (other[0, changed] + 1) % CONFIG.vocab_size
    before, after = np.asarray(forward(grouped, ids)), np.asarray(forward(grouped, other))
    np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
    assert (after[:, changed:] != before[:, changed:]).any(axis=-1).all()


@pytest.mark.sample(2)
def test_cached_decoding_gives_the_full_forward_pass_at_every_step(model):
    """Two texts of different lengths, each against its own full forward pass; the cache ends exactly full."""
    ids, lengths, capacity = random_ids(2, 12), np.array([3, 6], np.int32), 12
    full = np.asarray(forward(model, ids))
    logits, cache = prefill(model, ids[:, :6], lengths, capacity)
    for step in range(capacity - 6 + 1):
        at = lengths + step
        for row in range(2):
            assert_same_logits(logits[row], full[row, at[row] - 1])
        np.testing.assert_array_equal(cache.lengths, at)
        if step < capacity - 6:
            logits, cache = decode(model, ids[np.arange(2), at], cache)


def test_padding_has_no_influence(grouped):
    ids, lengths = random_ids(2, 8), np.array([2, 5], np.int32)
    other = np.where(np.arange(8) < lengths[:, None], ids, random_ids(2, 8, seed=1))
    assert (ids != other).any()
    (first, cache), (second, other_cache) = (prefill(grouped, x, lengths, 10) for x in (ids, other))
    np.testing.assert_array_equal(first, second)
    for _ in range(5):  # up to the capacity, over all the padding
        tokens = np.argmax(first, axis=-1).astype(np.int32)
        first, cache = decode(grouped, tokens, cache)
        second, other_cache = decode(grouped, tokens, other_cache)
        np.testing.assert_array_equal(first, second)


def test_a_ragged_batch_equals_its_prompts_alone(grouped):
    ids, lengths = random_ids(3, 7), np.array([1, 4, 7], np.int32)
    together, _ = prefill(grouped, ids, lengths, 7)
    for row, length in enumerate(lengths):
        assert_same_logits(together[row], forward(grouped, ids[row : row + 1])[0, length - 1])


def test_a_cache_too_small_for_the_prompts_is_refused(grouped):
    with pytest.raises(ValueError, match="capacity=5 positions cannot hold prompts padded to 6 tokens"):
        grouped.prefill(random_ids(1, 6), jnp.array([6]), 5)


def test_ids_of_another_shape_are_refused(grouped):
    with pytest.raises(ValueError, match=r"shape .batch, length., got \(3,\): one text is ids.None."):
        grouped(jnp.arange(3))
    cache = jax.eval_shape(lambda: grouped.prefill(jnp.zeros((1, 3), jnp.int32), jnp.array([3]), 8))[1]
    with pytest.raises(ValueError, match=r"shape .batch., one of each sequence, got \(1, 1\)"):
        jax.eval_shape(grouped.decode, jnp.zeros((1, 1), jnp.int32), cache)


def test_rotary_positions_end_with_the_context(grouped):
    ids = random_ids(1, 33)
    message = "33 tokens exceed the model's context of 32: shorten the text, or give model.config a longer"
    with pytest.raises(ValueError, match=message):
        grouped(ids)
    with pytest.raises(ValueError, match=message):
        grouped.prefill(ids, jnp.array([33]), 64)


def test_the_cache_holds_only_key_heads(grouped):
    _, cache = prefill(grouped, random_ids(2, 6), np.array([6, 6], np.int32), 9)
    assert cache.capacity == 9
    assert cache.keys.shape == cache.values.shape == (3, 2, CONFIG.num_kv_heads, 9, CONFIG.head_dim)


def test_bfloat16_parameters_stay_bfloat16_and_logits_are_float32():
    model = random_transformer(CONFIG, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    ids = random_ids(1, 6)
    assert jax.eval_shape(lambda model: model.hidden_states(ids), model).dtype == jnp.bfloat16
    logits, cache = jax.eval_shape(lambda model: model.prefill(ids, jnp.array([6]), 8), model)
    assert (logits.dtype, cache.keys.dtype, cache.values.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    logits, grown = jax.eval_shape(lambda model, cache: model.decode(ids[:, 0], cache), model, cache)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), grown) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), cache
    )
    # bfloat16 rounds to 2^-9; measured 1% of the largest logit after three layers of a dozen roundings.
    expected = numpy_logits(model, ids[0])
    np.testing.assert_allclose(forward(model, ids)[0], expected, rtol=0, atol=0.04 * np.abs(expected).max())


@pytest.mark.parametrize("step", ["forward", "decode"])
def test_the_layer_stack_compiles_as_one_layer(step):
    def num_equations(num_layers):
        model = random_transformer(dataclasses.replace(CONFIG, num_layers=num_layers))
        if step == "forward":
            traced = jax.make_jaxpr(lambda model, ids: model(ids))(model, random_ids(1, 6))
        else:
            _, cache = jax.eval_shape(lambda model: model.prefill(random_ids(1, 6), jnp.array([6]), 8), model)
            traced = jax.make_jaxpr(lambda model, ids, cache: model.decode(ids, cache))(model, random_ids(1), cache)
        return str(traced).count(" = ")

    assert num_equations(1) == num_equations(7) > 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_ids_have_no_logits(shape):
    config = TransformerConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=64,
        context_length=32,
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(0))
    ids = jnp.zeros(shape, jnp.int32)
    assert model(ids).shape == (*shape, 64)
    with pytest.raises(ValueError, match="prompts need at least one token"):
        model.prefill(ids, jnp.zeros(shape[0], jnp.int32), 8)
