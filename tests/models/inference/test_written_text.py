"""Text that a model writes: reproducible, distributed as the model's own probabilities, of the asked shape."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.written_text import write_windows
from bipolar_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_size=20,
    context_length=40,
    bos_id=1,
    eos_ids=(2,),
)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model() -> Transformer:
    rng = np.random.default_rng(1)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), state))


@pytest.fixture(scope="module")
def written(model) -> np.ndarray:
    return write_windows(model, 300, 20, key=KEY, windows_per_step=128)


def test_tokens_follow_the_probabilities_of_the_model(model, written):
    """Sums of (indicator - probability), a martingale whose steps have variance p (1 - p): within 4.5 deviations."""
    logits = np.asarray(jax.jit(lambda model, ids: model(ids))(model, written), np.float64)[:, :-1]
    probabilities = np.exp(logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))
    seen = np.eye(CONFIG.vocab_size)[written[:, 1:]]
    excess = (seen - probabilities).sum(axis=(0, 1))
    deviation = np.sqrt((probabilities * (1 - probabilities)).sum(axis=(0, 1)))
    assert np.all(np.abs(excess) < 4.5 * deviation)
    assert deviation.max() < 0.3 * seen.sum(axis=(0, 1)).max(), "enough tokens for this to tell anything"


def test_windows_begin_with_any_token_but_those_that_begin_or_end_a_text_and_go_on_after_an_end(written):
    assert set(written[:, 0]) == set(range(CONFIG.vocab_size)) - {1, 2}
    ends = np.argmax(written == 2, axis=1)
    assert (ends > 0).sum() > 20
    assert all(len(set(window[end + 1 :])) > 1 for window, end in zip(written, ends, strict=True) if 0 < end < 12)


def test_a_key_gives_the_same_windows_and_more_of_them_begin_alike(model, written):
    again = write_windows(model, 130, 20, key=KEY, windows_per_step=128)
    np.testing.assert_array_equal(again, written[:130])
    assert not np.array_equal(written[:128], written[128:256])
    other = write_windows(model, 128, 20, key=jax.random.key(6), windows_per_step=128)
    assert not np.array_equal(other, written[:128])


@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_any_length_up_to_the_context(model, length):
    windows = write_windows(model, 3, length, key=KEY, first_id=4)
    assert windows.shape == (3, length)
    assert windows.dtype == np.int32
    assert set(windows[:, 0]) == {4}
    assert windows.min() >= 0


def test_progress_reaches_the_number_of_windows(model):
    steps = []
    write_windows(model, 3, 20, key=KEY, windows_per_step=2, on_window=steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == 3
    assert 0 < steps[0] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "got windows=0"),
        ({"length": 41}, "windows of 41 tokens exceed the model's context of 40"),
        ({"first_id": 11}, "token ids span 11..11"),
    ],
)
def test_impossible_requests_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        write_windows(model, **({"windows": 1, "length": 4, "key": KEY} | options))


def test_nan_weights_are_refused(model):
    broken = nnx.clone(model)
    broken.final_norm.scale[...] = jnp.full_like(broken.final_norm.scale[...], jnp.nan)
    with pytest.raises(ValueError, match="the logits of token 1 of a window are NaN"):
        write_windows(broken, 2, 20, key=KEY)


def test_a_vocabulary_of_special_ids_alone_is_drawn_from_whole(model):
    special = nnx.clone(model)
    special.config = dataclasses.replace(CONFIG, eos_ids=tuple(range(11)))
    assert len(set(write_windows(special, 30, 1, key=KEY)[:, 0])) > 5
