"""Perplexity against its definition in float64, from the model's own logits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.perplexity import Perplexity, paired_difference, perplexity
from bipolar_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=19, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=20, context_length=16
)
LENGTH, WINDOWS = 12, 7
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, LENGTH * WINDOWS + 5).tolist()


def filled(fill) -> Transformer:
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(fill(leaf.shape), leaf.dtype), state))


@pytest.fixture(scope="module")
def model() -> Transformer:
    rng = np.random.default_rng(1)
    return filled(lambda shape: 0.4 * rng.standard_normal(shape) + 0.2)


@pytest.fixture(scope="module")
def window_losses(model) -> np.ndarray:
    """NLL of tokens 1 .. L-1 of ids[L i : L (i + 1)], each window read by itself; float64 [windows, L - 1]."""
    forward = jax.jit(lambda model, ids: model(ids))
    losses = []
    for i in range(WINDOWS):
        window = IDS[LENGTH * i : LENGTH * (i + 1)]
        logits = np.asarray(forward(model, np.array([window], np.int32))[0], np.float64)
        log_z = np.log(np.sum(np.exp(logits), axis=-1))
        losses.append([log_z[t - 1] - logits[t - 1, window[t]] for t in range(1, LENGTH)])
    return np.array(losses)


@pytest.mark.parametrize("windows", [2, WINDOWS])
def test_perplexity_is_exp_of_the_mean_loss_of_a_token(model, window_losses, windows):
    result = perplexity(model, IDS, windows=windows, window_length=LENGTH)
    total = window_losses[:windows].sum()
    # float32 logits and losses of order 1: some 1e-7 each, with a margin of ten.
    assert result.perplexity == pytest.approx(math.exp(total / (windows * (LENGTH - 1))), rel=2e-6)
    assert (result.windows, result.scored_tokens) == (windows, windows * (LENGTH - 1))
    np.testing.assert_allclose(result.window_losses, window_losses[:windows].mean(axis=1), rtol=2e-6)
    assert result.perplexity > 1.2 * CONFIG.vocab_size, "random weights must not look like uniform ones"


def test_standard_error_is_that_of_the_mean_of_windows_times_the_perplexity(model, window_losses):
    """d exp(x) = exp(x) dx, and the error of a mean of n is the sample deviation over sqrt(n)."""
    means = window_losses.mean(axis=1)
    spread = math.sqrt(sum((mean - means.mean()) ** 2 for mean in means) / (WINDOWS - 1))
    result = perplexity(model, IDS, windows=WINDOWS, window_length=LENGTH)
    assert result.standard_error == pytest.approx(result.perplexity * spread / math.sqrt(WINDOWS), rel=1e-5)


def scored(*losses: float) -> Perplexity:
    return Perplexity(math.exp(np.mean(losses)), 0.0, len(losses), 11 * len(losses), losses)


def test_paired_differences_leave_out_what_windows_have_in_common():
    """Losses from 1 to 5 that all rise by 0.1 differ by 0.1 without an error."""
    difference = paired_difference(scored(1.1, 3.1, 5.1), scored(1.0, 3.0, 5.0))
    assert difference.loss == pytest.approx(0.1)
    assert difference.standard_error == pytest.approx(0, abs=1e-12)
    assert difference.relative_perplexity == pytest.approx(math.exp(0.1))
    uneven = paired_difference(scored(1.3, 3.0), scored(1.0, 3.0))
    assert uneven.standard_error == pytest.approx(0.15)  # deviation 0.3 / sqrt(2), over sqrt(2)
    assert math.isnan(paired_difference(scored(1.3), scored(1.0)).standard_error)
    with pytest.raises(ValueError, match="3 windows of 33 tokens cannot be paired with 2 of 22"):
        paired_difference(scored(1.0, 2.0, 3.0), scored(1.0, 2.0))


def test_one_window_has_no_standard_error(model, window_losses):
    result = perplexity(model, IDS, windows=1, window_length=LENGTH)
    assert math.isnan(result.standard_error)
    assert result.perplexity == pytest.approx(math.exp(window_losses[0].mean()), rel=2e-6)


@pytest.mark.parametrize("windows_per_step", [1, 3, WINDOWS, 100])
def test_the_batch_size_does_not_matter(model, window_losses, windows_per_step):
    scored = []
    result = perplexity(
        model,
        np.array(IDS),
        windows=WINDOWS,
        window_length=LENGTH,
        windows_per_step=windows_per_step,
        on_window=scored.append,
    )
    assert result.perplexity == pytest.approx(math.exp(window_losses.mean()), rel=2e-6)
    assert scored == [min(n, WINDOWS) for n in range(windows_per_step, WINDOWS + windows_per_step, windows_per_step)]


def test_equal_logits_give_the_vocabulary_size():
    result = perplexity(filled(np.zeros), IDS, windows=3, window_length=LENGTH)
    assert result.perplexity == pytest.approx(CONFIG.vocab_size, rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-5)


def test_the_shortest_window_scores_one_token(model, window_losses):
    result = perplexity(model, IDS, windows=1, window_length=2)
    assert result.scored_tokens == 1
    assert result.perplexity == pytest.approx(math.exp(window_losses[0, 0]), rel=2e-6)


def test_a_loss_too_large_for_its_exponential_is_infinite_perplexity(model):
    absurd = nnx.clone(model)
    absurd.lm_head.kernel[...] = 1e4 * model.lm_head.kernel[...]  # a loss of thousands; exp(710) overflows
    assert perplexity(absurd, IDS, windows=2, window_length=LENGTH).perplexity == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "got windows=0"),
        ({"windows": 1, "window_length": 1}, "got windows=1, window_length=1"),
        ({"windows": 1, "window_length": 17}, "window_length=17 exceeds the model's context of 16"),
        (
            {"windows": 8},
            "the text has 89 tokens, 8 windows of 12 need 96: ask for at most 7",
        ),
        ({"windows": 1, "windows_per_step": 0}, "windows_per_step"),
    ],
)
def test_impossible_requests_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, IDS, **({"window_length": LENGTH} | options))


@pytest.mark.parametrize("wrong", [-1, 19, 2**32 + 3])
def test_ids_of_another_vocabulary_are_refused(model, wrong):
    ids = [*IDS[:13], wrong, *IDS[14:]]
    with pytest.raises(ValueError, match=rf"token ids span .*{wrong}.*, outside the vocabulary 0\.\.18"):
        perplexity(model, np.array(ids), windows=2, window_length=LENGTH)
    assert perplexity(model, ids, windows=1, window_length=LENGTH).windows == 1, "only scored windows matter"


def test_nan_weights_are_refused(model):
    broken = nnx.clone(model)
    broken.final_norm.scale[...] = jnp.full_like(broken.final_norm.scale[...], jnp.nan)
    with pytest.raises(ValueError, match="loss of window 0 is not finite"):
        perplexity(broken, IDS, windows=2, window_length=LENGTH)
