"""Likelihoods of continuations against the model's own logits, each text by itself, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.models.inference.continuations import score_continuations
from tests.support.tiny_transformers import ARCHITECTURES, random_transformer

CONFIG = next(iter(ARCHITECTURES.values()))
VOCAB = CONFIG.vocab_size
PAIRS = [([1, 2, 3], [4, 5]), ([6], [7]), ([3, 1] * 4, []), ([2, 8], [9, 1, 1, 3, 2]), ([6], [5])]


@pytest.fixture(scope="module")
def model():
    return random_transformer(CONFIG)


def likelihood(model, context, continuation):
    text = [*context, *continuation]
    logits = np.asarray(jax.jit(lambda model, ids: model(ids))(model, np.array([text], np.int32))[0], np.float64)
    logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    at = range(len(context) - 1, len(text) - 1)
    greedy = all(int(np.argmax(logits[i])) == text[i + 1] for i in at)
    return sum(logprobs[i, text[i + 1]] for i in at), greedy


def test_likelihoods_are_those_of_each_text_by_itself(model):
    best = int(np.argmax(np.asarray(model(jnp.asarray([[6]], jnp.int32)))[0, 0]))
    pairs = [*PAIRS, ([6], [best])]
    steps = []
    scored = score_continuations(model, pairs, texts_per_step=4, on_text=steps.append)
    for found, (context, continuation) in zip(scored, pairs, strict=True):
        logprob, greedy = likelihood(model, context, continuation)
        assert found.logprob == pytest.approx(logprob, abs=2e-5)
        assert (found.greedy, found.tokens) == (greedy, len(continuation))
    assert scored[-1].greedy
    assert steps == [4, 6]
    assert score_continuations(model, []) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "context 0 is empty"),
        (([1], [VOCAB]), "outside the vocabulary"),
        (([1], [1] * (CONFIG.context_length + 1)), "shorten its context"),
    ],
)
def test_impossible_texts_are_refused(model, pair, message):
    with pytest.raises(ValueError, match=message):
        score_continuations(model, [pair])


def test_the_last_token_may_follow_a_full_context(model):
    text = [1] * CONFIG.context_length
    assert score_continuations(model, [(text, [2])])[0].tokens == 1


def test_nan_weights_are_refused(model):
    broken = nnx.clone(model)
    broken.final_norm.scale[...] = jnp.full_like(broken.final_norm.scale[...], jnp.nan)
    with pytest.raises(ValueError, match="the likelihood of text 0 is NaN"):
        score_continuations(broken, PAIRS[:1])
