"""Generation: the same tokens as full forward passes give, from any batch, until each text ends."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference import generation
from bipolar_jax.models.inference.generation import generate, stream
from bipolar_jax.models.inference.sampling import Sampling
from bipolar_jax.models.transformer import Transformer

# The context is no multiple of what lengths are rounded up to.
CONFIG = TransformerConfig(
    vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40, context_length=72
)
PROMPTS = [[1, 2, 3], [30, 4, 36, 0, 7, 7, 9], [5]]
RANDOM = Sampling(temperature=1.0)

forward = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights large enough that greedy texts differ between prompts and do not repeat one token."""
    rng = np.random.default_rng(2)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype), state)
    return nnx.merge(graph, weights)


def with_eos(model: Transformer, *eos_ids: int) -> Transformer:
    ending = nnx.clone(model)
    ending.config = dataclasses.replace(model.config, eos_ids=eos_ids)
    return ending


def greedy_loop(model: Transformer, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Full forward passes and argmax; what follows the text is padding, which causality hides."""
    text = list(prompt)
    for _ in range(max_new_tokens):
        ids = np.zeros((1, CONFIG.context_length), np.int32)
        ids[0, : len(text)] = text
        text.append(int(np.argmax(forward(model, ids)[0, len(text) - 1])))
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    """Twelve greedy tokens after each prompt."""
    return [greedy_loop(model, prompt, 12) for prompt in PROMPTS]


def test_greedy_tokens_are_those_of_full_forward_passes(model, greedy):
    assert len(set(map(tuple, greedy))) == len(PROMPTS), "the texts must differ for this test to tell anything"
    assert min(len(set(tokens)) for tokens in greedy) > 2
    assert generate(model, PROMPTS, 12) == greedy


def test_each_prompt_is_continued_as_if_it_were_alone(model, greedy):
    assert [generate(model, [prompt], 12)[0] for prompt in PROMPTS] == greedy


@pytest.mark.parametrize("precision", ["W8A8"])
def test_quantized_models_generate_what_their_full_forward_passes_give(model, precision):
    quantized = bj.quantize_model(model, [(".*", bj.Precision.parse(precision))])
    assert generate(quantized, PROMPTS[:2], 6) == [greedy_loop(quantized, prompt, 6) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("prompt_length", [1, 60, 64, 65, 71])
def test_prompt_and_new_tokens_may_fill_the_context_exactly(model, prompt_length):
    prompt = np.random.default_rng(1).integers(0, CONFIG.vocab_size, prompt_length).tolist()
    max_new_tokens = CONFIG.context_length - prompt_length
    tokens = generate(model, [prompt], max_new_tokens)[0]
    assert len(tokens) == max_new_tokens
    # One forward pass over prompt and new tokens checks every choice.
    choices = np.argmax(forward(model, np.array([prompt + tokens], np.int32))[0], axis=-1)
    assert tokens == choices[prompt_length - 1 : -1].tolist()


def test_every_row_stops_at_its_own_end_and_the_stream_at_the_last(model, greedy):
    ends = [first_at(tokens, 2) for tokens in greedy]
    rows = [tokens[: min(tokens.index(end) for end in ends if end in tokens) + 1] for tokens in greedy]
    longest = max(map(len, rows))
    assert longest < 12, "the stream must end early"
    assert len(set(map(len, rows))) > 1, "rows must end at different steps"
    steps = np.stack(list(stream(with_eos(model, *ends), PROMPTS, 12)))
    assert steps.shape == (longest, len(PROMPTS))
    for column, row in zip(steps.T, rows, strict=True):
        np.testing.assert_array_equal(column, row + [-1] * (longest - len(row)))
    assert generate(with_eos(model, *ends), PROMPTS, 12) == rows


def first_at(tokens: list[int], step: int) -> int:
    """The first token from `step` on that did not come before."""
    return next(token for i, token in enumerate(tokens) if i >= step and token not in tokens[:i])


@pytest.mark.parametrize("cache_bits", [None, 8, 4])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=9)], ids=["greedy", "sampled"])
def test_generate_gives_what_stream_yields(model, sampling, cache_bits):
    """On the device until all have ended; each ends by itself, the last before the limit."""
    key = jax.random.key(3)
    free = np.stack(list(stream(model, PROMPTS, 12, sampling, key, cache_bits)))
    ending = with_eos(model, *(first_at(column.tolist(), 2 + row) for row, column in enumerate(free.T)))
    steps = np.stack(list(stream(ending, PROMPTS, 12, sampling, key, cache_bits)))
    expected = [[int(token) for token in column if token >= 0] for column in steps.T]
    assert generate(ending, PROMPTS, 12, sampling, key, cache_bits) == expected
    assert len(steps) < 12
    assert generate(model, PROMPTS, 12, sampling, key, cache_bits) == free.T.tolist()


def test_the_device_stops_when_all_have_ended(model, greedy, monkeypatch):
    caches = []
    inner = generation._all_tokens
    monkeypatch.setattr(generation, "_all_tokens", lambda *args: caches.append(inner(*args)) or caches[-1])
    generate(with_eos(model, greedy[0][3]), PROMPTS[:1], 60)
    ((_, cache),) = caches
    steps = greedy[0].index(greedy[0][3])  # each reads one token more
    np.testing.assert_array_equal(cache.lengths, [len(PROMPTS[0]) + steps])


def test_texts_of_about_the_same_length_share_one_compilation(model):
    sizes = []
    for max_new_tokens in (3, 5, 12):
        generate(model, PROMPTS[:1], max_new_tokens)
        sizes.append(generation._all_tokens._cache_size())
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("write", [generate, stream])
def test_other_cache_bits_are_refused_at_the_call(model, write):
    with pytest.raises(ValueError, match="cache_bits must be 8 or 4, or None to keep floats, got 5"):
        write(model, PROMPTS, 2, cache_bits=5)


def test_the_stream_computes_no_further_than_it_is_read(model, greedy, monkeypatch):
    calls = []
    monkeypatch.setattr(
        generation, "_next_token", lambda *args, step=generation._next_token: calls.append(1) or step(*args)
    )
    tokens = stream(model, PROMPTS, 12)
    for step in range(3):
        written = next(tokens)
        assert len(calls) == step
        assert written.dtype == np.int32
        np.testing.assert_array_equal(written, [row[step] for row in greedy])


def test_the_key_decides_the_text(model):
    first, again, other = (generate(model, PROMPTS, 12, RANDOM, jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_every_step_and_every_row_draws_anew(model):
    """With equal logits everywhere, a key used twice would give the same tokens twice."""
    graph, state = nnx.split(model)
    uniform = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    tokens = generate(uniform, PROMPTS, 12, RANDOM, jax.random.key(0))
    assert all(len(set(row)) > 5 for row in tokens)  # of 37 ids, 12 draws give 10 different ones on average
    assert len(set(map(tuple, tokens))) == len(PROMPTS)


def test_greedy_needs_no_key_and_ignores_one(model, greedy):
    assert generate(model, PROMPTS, 12, Sampling(), jax.random.key(5)) == greedy


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 1, "no prompts"),
        ([[1], [], [2]], 1, "prompt 1 is empty"),
        ([[1]], 0, "max_new_tokens must be at least 1, got 0"),
        ([[1, 37]], 1, r"token ids span 1\.\.37, outside the vocabulary 0\.\.36"),
        ([[1, -1]], 1, r"token ids span -1\.\."),
        ([[1, 2**40]], 1, "outside the vocabulary"),
        ([[1], [2] * 70], 3, "a prompt of 70 tokens and 3 new ones exceed the model's context of 72"),
        ([[2] * 73], 1, "a prompt of 73 tokens and 1 new ones exceed the model's context of 72"),
    ],
)
def test_impossible_requests_are_refused(model, prompts, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, max_new_tokens)


def test_drawing_at_random_needs_a_key(model):
    with pytest.raises(ValueError, match=r"temperature=1\.0 draws at random: pass a PRNG key"):
        generate(model, PROMPTS, 2, RANDOM)
