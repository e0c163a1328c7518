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
from bipolar_jax.models.inference import decode_loop, generation
from bipolar_jax.models.inference.generation import generate, stream
from bipolar_jax.models.inference.sampling import Sampling
from bipolar_jax.models.transformer import Transformer

# The context is no multiple of what lengths are rounded up to.
CONFIG = TransformerConfig(
    vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40, context_length=72
)
PROMPTS = [[1, 2, 3], [30, 4, 36, 0, 7, 7, 9], [5]]
PROMPT_TOKENS = {token for prompt in PROMPTS for token in prompt}
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
@pytest.mark.covered("test_quantized_model.py, whose decoding has the logits of full passes")
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
@pytest.mark.sample(1)
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
    states = []
    inner = generation.next_tokens
    monkeypatch.setattr(generation, "next_tokens", lambda *args: states.append(inner(*args)) or states[-1])
    generate(with_eos(model, greedy[0][3]), PROMPTS[:1], 60)
    ((_, state),) = states
    steps = greedy[0].index(greedy[0][3])  # each reads one token more
    np.testing.assert_array_equal(state.cache.lengths, [len(PROMPTS[0]) + steps])


def test_texts_of_about_the_same_length_share_one_compilation(model):
    sizes = []
    for max_new_tokens in (3, 5, 12):
        generate(model, PROMPTS[:1], max_new_tokens)
        sizes.append(decode_loop.next_tokens._cache_size())
    assert len(set(sizes)) == 1


def test_the_host_looks_after_every_16_tokens(model, greedy, monkeypatch):
    """Ctrl-C reaches Python between two chunks."""
    calls, inner = [], generation.next_tokens

    def interrupted(*args):
        calls.append(int(args[-1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(generation, "next_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS[:1], 60)
    assert calls == [16, 16, 16]


@pytest.mark.parametrize("write", [generate, stream])
def test_other_cache_bits_are_refused_at_the_call(model, write):
    with pytest.raises(ValueError, match="cache_bits must be 8 or 4, or None to keep floats, got 5"):
        write(model, PROMPTS, 2, cache_bits=5)


def test_the_stream_computes_no_further_than_it_is_read(model, greedy, monkeypatch):
    calls = []
    monkeypatch.setattr(
        generation, "next_tokens", lambda *args, step=generation.next_tokens: calls.append(1) or step(*args)
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
        (5, 1, "prompts must be a text, a conversation .* or a list, got 5"),
        ([[1]], 0, "max_new_tokens must be an integer of at least 1, got 0"),
        ([[1]], 2.5, r"max_new_tokens must be an integer of at least 1, got 2\.5"),
        ([[1]], True, "max_new_tokens must be an integer of at least 1, got True"),
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


def test_without_a_key_each_call_draws_anew(model):
    assert generate(model, PROMPTS, 12, RANDOM) != generate(model, PROMPTS, 12, temperature=1.0)


@pytest.mark.parametrize("n", [8, 40])
def test_both_kinds_of_keys_give_the_same_texts(model, n):
    typed, legacy = jax.random.key(4), jax.random.PRNGKey(4)
    expected = generate(model, PROMPTS, n, RANDOM, typed)
    assert generate(model, PROMPTS, n, RANDOM, legacy) == expected
    assert generate(model, PROMPTS, n, RANDOM, np.asarray(legacy)) == expected
    for key in (typed, legacy):
        assert np.stack(list(stream(model, PROMPTS, n, RANDOM, key))).T.tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_ids": [2**40]}, "outside the vocabulary"),
        ({"end_ids": [1.7]}, r"token ids must be a sequence of integers, got \[1.7\]"),
        ({"end_ids": 3}, "token ids must be a sequence of integers, got 3"),
        ({"sampling": None}, "sampling must be a Sampling, or leave it out and give temperature, got None"),
        ({"sampling": RANDOM, "key": 3}, r"key must be a PRNG key such as jax.random.key\(0\), got 3"),
        ({"model": "model.gguf"}, "got a str: give a Transformer, such as the model of a PretrainedModel"),
    ],
)
def test_options_of_another_type_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": model, "prompts": PROMPTS, "max_new_tokens": 2} | options)


def test_functions_of_the_model_alone_say_so(model):
    pretrained = bj.models.PretrainedModel(model, None)
    for ask in (
        lambda: bj.explain_model(pretrained, 1, 8),
        lambda: bj.models.perplexity(pretrained, [1] * 8, windows=1, window_length=8),
        lambda: bj.models.score_continuations(pretrained, [([1], [2])]),
        lambda: bj.models.write_windows(pretrained, 1, 8, key=jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match="got a PretrainedModel: give a Transformer, such as the model of"):
            ask()
    with pytest.raises(ValueError, match=r"got a Transformer: give a model with its tokenizer, PretrainedModel\(model"):
        bj.models.save_model("unwritten.safetensors", model)


def test_an_array_of_keys_is_refused(model):
    with pytest.raises(ValueError, match=r"key must be one PRNG key, got an array of \(2,\)"):
        generate(model, PROMPTS, 2, RANDOM, jax.random.split(jax.random.key(0)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return (
        logits
        - logits.max(-1, keepdims=True)
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))[..., None]
    )


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_k=5, repetition_penalty=1.3)], ids=str)
@pytest.mark.sample(1)
def test_log_probabilities_are_those_of_full_forward_passes(model, sampling):
    done = generate(model, PROMPTS, 20, sampling, jax.random.key(0), logprobs=True)
    assert [text.tokens for text in done] == generate(model, PROMPTS, 20, sampling, jax.random.key(0))
    for prompt, text in zip(PROMPTS, done, strict=True):
        assert (text.finish, text.text) == ("length", None)
        logits = np.asarray(forward(model, np.array([prompt + text.tokens], np.int32)))[0, len(prompt) - 1 : -1]
        expected = log_softmax(logits)[np.arange(20), text.tokens]
        np.testing.assert_allclose(text.logprobs, expected, rtol=2e-4, atol=2e-4)
    tokens, logprobs = zip(*stream(model, PROMPTS, 20, sampling, jax.random.key(0), logprobs=True), strict=True)
    assert np.stack(tokens).T.tolist() == [text.tokens for text in done]
    np.testing.assert_array_equal(np.stack(logprobs).T, np.float32([text.logprobs for text in done]))


def test_a_repetition_penalty_is_that_of_its_definition(model):
    """Compared to full forward passes; the penalty counts the prompt's tokens and the new ones."""
    text = list(PROMPTS[1])
    for _ in range(10):
        logits = np.asarray(forward(model, np.array([text + [0] * (72 - len(text))], np.int32)))[0, len(text) - 1]
        seen = np.unique(text)
        logits = logits.copy()
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
        text.append(int(np.argmax(logits)))
    expected = text[len(PROMPTS[1]) :]
    assert expected != generate(model, PROMPTS[1:2], 10)[0]
    assert generate(model, PROMPTS[:2], 10, repetition_penalty=1.7)[1] == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), RANDOM], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_stop_with_an_error_that_names_the_step(model, greedy, value, sampling):
    """The embedding of one token is damaged: the first logits after it are not finite."""
    key = jax.random.key(0)
    free = generate(model, PROMPTS, 12, sampling, key)
    row, step = next((row, step) for step in range(12) for row in range(3) if free[row][step] not in PROMPT_TOKENS)
    damaged = nnx.clone(model)
    damaged.embed.embedding[...] = damaged.embed.embedding[...].at[free[row][step]].set(value)
    message = f"the logits at step {step + 1} of prompt {row} are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        generate(damaged, PROMPTS, 12, sampling, key)
    tokens = stream(damaged, PROMPTS, 12, sampling, key)
    assert [next(tokens).tolist() for _ in range(step + 1)] == np.array(free).T[: step + 1].tolist()
    with pytest.raises(ValueError, match=message):
        next(tokens)
    damaged.embed.embedding[...] = jnp.full_like(damaged.embed.embedding[...], value)
    with pytest.raises(ValueError, match="the logits at step 0 of prompt 0"):
        generate(damaged, PROMPTS, 1, sampling, key)


def test_a_text_that_has_ended_is_not_checked(model, greedy):
    """What follows the end of a short text is not part of it."""
    damaged = nnx.clone(with_eos(model, greedy[0][0]))
    damaged.embed.embedding[...] = damaged.embed.embedding[...].at[greedy[0][0]].set(jnp.nan)
    assert greedy[0][0] not in PROMPT_TOKENS
    alone = generate(damaged, PROMPTS[:1], 12)
    assert alone == [greedy[0][:1]]
    others = [prompt for prompt, row in zip(PROMPTS, greedy, strict=True) if greedy[0][0] not in row]
    assert generate(damaged, [PROMPTS[0], *others], 12)[0] == alone[0]


def test_end_ids_of_a_call_replace_those_of_the_model(model, greedy):
    ending = with_eos(model, greedy[0][3])
    assert generate(ending, PROMPTS[:1], 12, end_ids=()) == greedy[:1]
    end = first_at(greedy[0], 5)
    assert generate(ending, PROMPTS[:1], 12, end_ids=[end]) == [greedy[0][: greedy[0].index(end) + 1]]
