"""`sample` against the definitions, in numpy, by the counts of many draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.models.inference.sampling import Sampling, draw, sample

LOGITS = np.array([0.3, -1.0, 2.0, 1.5, 0.0, -4.0, 1.2], np.float32)
DRAWS = 20_000


def draws(logits: np.ndarray, sampling: Sampling, seed: int = 0) -> np.ndarray:
    """How often each token comes, of DRAWS draws in one call."""
    tokens = sample(jnp.tile(jnp.asarray(logits), (DRAWS, 1)), sampling, jax.random.key(seed))
    assert tokens.shape == (DRAWS,)
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=len(logits))


def definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities: softmax of logits / temperature, the top k of them, of these the nucleus; float64."""
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    kept = order[: sampling.top_k]
    total, nucleus = 0.0, []
    for token in kept:
        if total / probabilities[kept].sum() >= sampling.top_p:
            break
        nucleus.append(token)
        total += probabilities[token]
    result = np.zeros(len(logits))
    result[nucleus] = probabilities[nucleus] / total
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.3),
        Sampling(temperature=1.0, top_p=0.75),
        Sampling(temperature=1.0, top_p=0.999),
        Sampling(temperature=2.0, top_k=4, top_p=0.8),
    ],
    ids=str,
)
def test_draws_have_the_probabilities_of_the_definition(sampling):
    counts, probabilities = draws(LOGITS, sampling), definition(LOGITS, sampling)
    assert (counts[probabilities == 0] == 0).all(), "a token was drawn that is excluded"
    # Counts are binomial; six standard deviations and one draw for rounding.
    bound = 6 * np.sqrt(DRAWS * probabilities * (1 - probabilities)) + 1
    assert (np.abs(counts - DRAWS * probabilities) <= bound).all()


def test_the_nucleus_is_taken_of_what_top_k_keeps():
    """Of p = .5 .3 .1 .1 two remain, renormalized .625 .375: the first alone reaches 0.6, of all four it would not."""
    logits = np.log(np.array([0.5, 0.3, 0.1, 0.1], np.float32))
    both = draws(logits, Sampling(temperature=1.0, top_k=2, top_p=0.6))
    np.testing.assert_array_equal(both, [DRAWS, 0, 0, 0])
    assert np.count_nonzero(draws(logits, Sampling(temperature=1.0, top_p=0.6))) == 2


def test_rows_have_their_own_logits():
    logits = np.full((3, 5), -np.inf, np.float32)
    logits[[0, 1, 2], [4, 0, 2]] = 0
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
        np.testing.assert_array_equal(sample(jnp.asarray(logits), sampling, jax.random.key(0)), [4, 0, 2])


def test_greedy_takes_the_largest_and_of_ties_the_first():
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [-1.0, -2.0, -3.0, -1.0]])
    tokens = sample(logits, Sampling())
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, [1, 0])


def test_a_tiny_temperature_is_greedy():
    np.testing.assert_array_equal(np.flatnonzero(draws(LOGITS, Sampling(temperature=1e-3))), [np.argmax(LOGITS)])


def test_tokens_tied_at_the_kth_place_are_all_kept():
    """None of them is likelier than another, so none may be favoured by its id."""
    logits = np.array([0.0, 1.0, 1.0, 2.0, 1.0], np.float32)
    counts = draws(logits, Sampling(temperature=1.0, top_k=2))
    np.testing.assert_array_equal(counts > 0, [False, True, True, True, True])


def test_a_nucleus_of_ties_is_the_fewest_that_reach_top_p():
    counts = draws(np.zeros(8, np.float32), Sampling(temperature=1.0, top_p=0.5))
    assert np.count_nonzero(counts) == 4


@pytest.mark.parametrize("top_k", [len(LOGITS), len(LOGITS) + 1, 10**9])
def test_top_k_of_the_whole_vocabulary_or_more_changes_nothing(top_k):
    np.testing.assert_array_equal(
        draws(LOGITS, Sampling(temperature=1.0, top_k=top_k)), draws(LOGITS, Sampling(temperature=1.0))
    )


def test_a_tiny_top_p_keeps_the_likeliest():
    counts = draws(LOGITS, Sampling(temperature=1.0, top_p=1e-9))
    np.testing.assert_array_equal(np.flatnonzero(counts), [np.argmax(LOGITS)])


def test_the_key_decides_the_draw():
    sampling = Sampling(temperature=1.0)
    logits = jnp.tile(LOGITS, (100, 1))
    first, again = (sample(logits, sampling, jax.random.key(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != sample(logits, sampling, jax.random.key(4))).any()


def test_eager_draws_share_a_compilation():
    logits = jnp.asarray(LOGITS)[None]
    sample(logits, Sampling(0.5), jax.random.key(0))
    before = draw._cache_size()
    for sampling in (Sampling(0.7), Sampling(1.0, top_k=2), Sampling(2.0, top_p=0.4)):
        sample(logits, sampling, jax.random.key(1))
    assert draw._cache_size() == before


def test_low_precision_logits_are_divided_in_float32():
    """In bfloat16, 10 and 10.0625 divided by 0.7 round to the same number; the definition keeps them apart."""
    logits = np.asarray(jnp.array([10.0, 10.0625], jnp.bfloat16))
    sampling = Sampling(temperature=0.07)
    probabilities = definition(logits.astype(np.float32), sampling)
    counts = draws(logits, sampling)
    assert np.abs(counts / DRAWS - probabilities).max() <= 6 * 0.5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be 0 .greedy. or at least 1e-06 and finite, got -0\.5"),
        ({"temperature": float("inf")}, "temperature must be 0 .greedy. or at least 1e-06 and finite, got inf"),
        ({"temperature": float("nan")}, "temperature must be 0 .greedy. or at least 1e-06 and finite, got nan"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, or None, got 0"),
        ({"top_k": 1.5}, r"top_k must be an integer of at least 1, or None, got 1\.5"),
        ({"top_k": True}, "top_k must be an integer of at least 1, or None, got True"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be above 0 and at most 1, got 1\.5"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-06 to 1e.06, got 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be from 1e-06 to 1e.06, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_settings_may_be_arrays_of_one_number():
    sampling = Sampling(temperature=jnp.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.25))
    assert (sampling, hash(sampling)) == (Sampling(0.5, 3, 0.25), hash(Sampling(0.5, 3, 0.25)))


def test_drawing_at_random_needs_a_key():
    with pytest.raises(ValueError, match=r"temperature=0\.7 draws at random: pass a PRNG key"):
        sample(jnp.zeros((1, 3)), Sampling(temperature=0.7))
