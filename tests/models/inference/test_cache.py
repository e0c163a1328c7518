"""The KV cache in floats and in bipolar-INT: its numbers, its bytes, and what decoding from it gives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.compress import rotate
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache, keep
from bipolar_jax.models.kv_cache.quantized_heads import QuantizedHeads
from bipolar_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=37, hidden_size=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, ffn_size=20, context_length=32
)
BITS = [None, 8, 4]
# Largest difference of a logit from the full forward pass, as a share of the largest logit: float32 rounding, and for
# quantized caches twice what was measured over six seeds (0.9% and 23%; heads of 8 numbers are few to average over).
TOLERANCE = {None: 6e-6, 8: 0.02, 4: 0.5}

forward = jax.jit(lambda model, ids: model(ids))
prefill = jax.jit(
    lambda model, ids, lengths, capacity, bits: model.prefill(ids, lengths, capacity, bits), static_argnums=(3, 4)
)
decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache), donate_argnums=2)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def random_heads(*shape: int, seed: int = 0) -> jax.Array:
    """Numbers with outliers, and one vector of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))
    x[(0,) * (len(shape) - 1)] = 0
    return jnp.asarray(x, jnp.float32)


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


# The data type.


@pytest.mark.parametrize("bits", [8, 4])
def test_every_number_is_within_half_a_step(bits):
    x = np.asarray(random_heads(3, 5, 64), np.float64)
    kept = QuantizedHeads.quantize(jnp.asarray(x, jnp.float32), bits)
    scale = np.asarray(kept.scale, np.float64)
    # The step, 2 * scale, follows from the extremes, zero included, and the number of codes.
    spread = np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)
    np.testing.assert_allclose(2 * scale, spread / (2**bits - 1), rtol=1e-6)
    error = np.abs(np.asarray(kept.dequantize()) - x)
    assert (error <= scale[..., None] * (1 + 1e-4)).all()
    assert error.max() > 0
    np.testing.assert_array_equal(kept.dequantize()[0, 0], np.zeros(64))


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_stays_zero_beside_an_outlier(bits):
    x = jnp.zeros((1, 64)).at[0, 3].set(1000.0).at[0, 5].set(-7.0)
    kept = QuantizedHeads.quantize(x, bits)
    assert np.count_nonzero(kept.dequantize() == 0) >= 62
    np.testing.assert_allclose(kept.dequantize()[0, 3], 1000.0, atol=float(kept.scale[0]))


def test_codes_of_four_bits_share_bytes():
    x = jnp.arange(16.0)[None]  # every code once
    kept = QuantizedHeads.quantize(x, 4)
    np.testing.assert_array_equal(kept.codes, [[low | (low + 8) << 4 for low in range(8)]])
    np.testing.assert_array_equal(kept.dequantize(), x)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_show(bits, bad):
    kept = QuantizedHeads.quantize(jnp.ones((2, 8)).at[0, 1].set(bad), bits)
    assert not np.isfinite(kept.dequantize()[0]).all()
    np.testing.assert_array_equal(kept.dequantize()[1], np.ones(8))


@pytest.mark.parametrize("bits", [1, 7, 16, "8"])
def test_other_bits_are_refused(model, bits):
    with pytest.raises(ValueError, match=f"cache_bits must be 8 or 4, or None to keep floats, got {bits!r}"):
        model.prefill(random_ids(1, 4), jnp.array([4]), 8, bits)


def test_four_bits_need_even_heads():
    with pytest.raises(ValueError, match="head_dim=7 is odd: use cache_bits=8"):
        QuantizedHeads.quantize(jnp.ones((2, 7)), 4)
    assert QuantizedHeads.quantize(jnp.ones((2, 7)), 8).codes.shape == (2, 7)


# The cache.


@pytest.mark.parametrize(("bits", "each"), [(None, 2 * 128), (8, 128 + 4 + 1), (4, 64 + 4 + 1)])
def test_bytes_are_those_of_the_numbers_scales_and_zeros(bits, each):
    config = dataclasses.replace(CONFIG, head_dim=128)
    model = nnx.eval_shape(lambda: Transformer(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    _, cache = jax.eval_shape(lambda model: model.prefill(random_ids(5, 6), jnp.full(5, 6), 16, bits), model)
    vectors = 2 * config.num_layers * 5 * config.num_kv_heads * 16
    assert cache.nbytes == vectors * each + 5 * 4
    assert cache.bits == bits
    assert cache.capacity == 16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.sample(2)
def test_prefill_and_decode_keep_the_same_numbers(model, bits):
    """A token written alone has the codes that it has among a prompt's."""
    ids, lengths = random_ids(2, 6), jnp.array([6, 6])
    _, whole = prefill(model, ids, lengths, 8, bits)
    _, grown = prefill(model, ids[:, :5], lengths - 1, 8, bits)
    _, grown = decode(model, ids[:, 5], grown)
    np.testing.assert_array_equal(grown.lengths, whole.lengths)
    assert jax.tree.structure(grown) == jax.tree.structure(whole)
    for expected, found in zip(whole.read(jnp.array(0)), grown.read(jnp.array(0)), strict=True):
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            # Products of other shapes may round a number otherwise, and so to the next code.
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=0, atol=1.0 if bits else 1e-5)
            assert np.mean(np.abs(a.astype(jnp.float32) - b.astype(jnp.float32)) > 1e-5) < 0.02


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.sample(2)
def test_decoding_is_close_to_the_full_forward_pass(model, bits):
    """Two texts of different lengths; the cache ends exactly full."""
    ids, lengths, capacity = random_ids(2, 12), np.array([3, 6], np.int32), 12
    full = np.asarray(forward(model, ids))
    logits, cache = prefill(model, ids[:, :6], lengths, capacity, bits)
    for step in range(capacity - 6 + 1):
        at = lengths + step
        expected = full[np.arange(2), at - 1]
        # Prefill itself reads no cache.
        tolerance = TOLERANCE[None if step == 0 else bits]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(full).max())
        if step < capacity - 6:
            logits, cache = decode(model, ids[np.arange(2), at], cache)


@pytest.mark.parametrize("bits", [8, 4])
def test_texts_attend_to_what_a_cache_would_keep(model, bits):
    """All at once they are what decoding from an empty cache makes of them, keys of 4 bits rotated, too."""
    model, ids = rotate(model, key=jax.random.key(0)), random_ids(1, 8)
    shape = (CONFIG.num_layers, 1, CONFIG.num_kv_heads, 8, CONFIG.head_dim)
    cache = KVCache.empty(shape, jnp.float32, bits, jnp.zeros(1, jnp.int32), model.config.key_rotation(bits))
    found = np.asarray(model.logits(model.hidden_states(ids, bits)))[0]
    worst = []
    for step, logits in enumerate(found):
        expected, cache = decode(model, ids[:, step], cache)
        worst.append(np.abs(logits - expected[0]).max())
    # Sums in another order may round a number to the next code.
    assert np.median(worst) < 1e-4 * np.abs(found).max()
    assert np.abs(found - np.asarray(forward(model, ids))[0]).max() > 100 * np.median(worst)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.sample(1)
def test_a_ragged_batch_equals_its_prompts_alone(model, bits):
    ids, lengths = random_ids(3, 7), np.array([1, 4, 7], np.int32)
    together, cache = prefill(model, ids, lengths, 9, bits)
    next_ids = random_ids(2, 3, seed=1)
    stepped = []
    for step in next_ids:
        together, cache = decode(model, step, cache)
        stepped.append(together)
    for row, length in enumerate(lengths):
        _, alone = prefill(model, ids[row : row + 1, :length], lengths[row : row + 1], 9, bits)
        for step, logits in zip(next_ids, stepped, strict=True):
            expected, alone = decode(model, step[row : row + 1], alone)
            np.testing.assert_allclose(logits[row], expected[0], rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", BITS)
def test_prompts_fill_the_first_positions_of_their_layer(bits):
    heads = random_heads(2, 3, 2, 8)
    cache = KVCache.empty((4, 2, 2, 5, 8), jnp.float32, bits, jnp.array([3, 2]))
    written = jax.jit(lambda cache, layer: cache.write_prompts(layer, heads, heads + 1))(cache, 2)
    for stored, x in ((written.keys, heads), (written.values, heads + 1)):
        for leaf, expected in zip(jax.tree.leaves(stored), jax.tree.leaves(keep(x, bits)), strict=True):
            np.testing.assert_array_equal(leaf[2, :, :, :3], expected)
            assert not leaf[2, :, :, 3:].any()
            assert not leaf[jnp.array([0, 1, 3])].any()
    np.testing.assert_array_equal(written.lengths, [3, 2])
    with pytest.raises(ValueError, match="capacity=5 positions cannot hold prompts padded to 6"):
        cache.write_prompts(0, random_heads(2, 6, 2, 8), random_heads(2, 6, 2, 8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.sample(2)
def test_a_full_cache_keeps_what_it_has(bits):
    heads = random_heads(2, 3, 2, 8)
    cache = KVCache.empty((1, 2, 2, 3, 8), jnp.float32, bits, jnp.array([3, 2])).write_prompts(0, heads, heads)
    written = cache.write(jnp.array(0), heads[:, :1] + 1, heads[:, :1] - 1)
    for before, after in zip(jax.tree.leaves(cache.keys), jax.tree.leaves(written.keys), strict=True):
        np.testing.assert_array_equal(after[:, 0], before[:, 0])
        assert (after[:, 1, :, 2] != before[:, 1, :, 2]).any()
        np.testing.assert_array_equal(after[:, 1, :, :2], before[:, 1, :, :2])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.sample(2)
def test_a_cache_is_donated_and_goes_through_scan(model, bits):
    logits, cache = prefill(model, random_ids(2, 4), jnp.array([4, 2]), 10, bits)

    def loop(model, tokens, cache):
        def step(carry, _):
            logits, cache = model.decode(*carry)
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), logits

        return jax.lax.scan(step, (tokens, cache), length=5)

    expected = []
    tokens = first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    stepped = jax.tree.map(jnp.copy, cache)
    for _ in range(5):
        logits, stepped = decode(model, tokens, stepped)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        expected.append(logits)
    (_, grown), scanned = jax.jit(loop, donate_argnums=2)(model, first, cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((cache.keys, cache.values)))
    np.testing.assert_allclose(scanned, jnp.stack(expected), rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(grown.lengths, [9, 7])
