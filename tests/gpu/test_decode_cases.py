"""The GPU suite's decode steps without a GPU: which cases run in which models, and what their limits follow from."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import Precision
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.random_weights import random_packed
from tests.gpu.cases.decode_step import PLANE_MODELS, PREPARED_MODELS, Step, plane_steps, prepared_steps
from tests.gpu.group import GROUPS
from tests.gpu.rounding_noise import decode_noise, ties_in_cache

CONFIG = TransformerConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=640,
    context_length=512,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
LENGTHS = (0, 250)


@pytest.mark.parametrize(
    ("group", "steps_of", "models", "kinds"),
    [("cases", plane_steps, PLANE_MODELS, 19), ("prepared_cases", prepared_steps, PREPARED_MODELS, 21)],
)
def test_each_kind_of_step_runs_in_two_models_and_each_model_meets_every_cache(group, steps_of, models, kinds):
    assert [arguments for *made_by, arguments in GROUPS.values() if made_by == ["decode_step", group]] == [
        (model,) for model in models
    ]
    runs = collections.Counter()
    for model in models:
        steps = steps_of(model)
        assert {step.cache_bits for step in steps} == {None, 8, 4}, model
        assert {step.dtype for step in steps} == {jnp.float32, jnp.bfloat16}, model
        assert len(steps) <= 13, f"{model}: a group has 270 s, and a case takes 18 s of one core"
        parsed = [Precision.parse(step.precision) for step in steps]
        if steps_of is prepared_steps:
            assert {(p.scales if p.group_size else None, p.a_bits is None) for p in parsed} >= {
                ("integer", False),
                ("float", False),
                (None, False),
                ("integer", True),
                ("float", True),
            }, model
        runs.update((step.precision, step.cache_bits, step.dtype, step.lengths) for step in steps)
    assert len(runs) == kinds
    assert min(runs.values()) >= 2


def both_ways(precision: str, config: TransformerConfig) -> list[np.ndarray]:
    """Logits of two texts, of a model that computes in bfloat16 and in float32: [texts, vocab] each."""
    key = jax.random.key(0)
    model = random_packed(config, Precision.parse(precision), dtype=jnp.bfloat16, key=key, embed_bits=None)
    step = Step(config, precision, None, jnp.bfloat16, LENGTHS)
    ids = np.arange(2, dtype=np.int32)
    models = [prepare_for_inference(model, dtype, layout="bytes") for dtype in (jnp.bfloat16, jnp.float32)]
    return [np.asarray(model.decode(ids, jax.tree.map(jnp.asarray, step._cache()))[0], np.float64) for model in models]


@pytest.mark.covered("`make gpu-test` holds the limits that follow")
@pytest.mark.parametrize("config", [TIED, CONFIG], ids=["tied", "untied"])
def test_noise_is_as_predicted(config):
    rounded, exact = both_ways("W4A8", config)
    for text, length in enumerate(LENGTHS):
        found = np.linalg.norm(rounded[text] - exact[text]) / np.linalg.norm(exact[text])
        predicted = decode_noise(config, 8, jnp.bfloat16, None, length).logits
        assert 0.5 * predicted < found < 1.3 * predicted


def test_a_tied_embedding_and_a_long_text_are_noisier():
    noise = {
        (config.tie_embeddings, length): decode_noise(config, 8, jnp.bfloat16, None, length).logits
        for config in (TIED, CONFIG)
        for length in LENGTHS
    }
    assert noise[True, 250] > 1.2 * noise[True, 0] > 2 * noise[False, 250]


@pytest.mark.parametrize("heads", [3, 64])
def test_values_of_single_bits_lie_between_codes_of_a_cache(heads):
    k, dim = 576, 64
    rng = np.random.default_rng(0)
    x, w = (2 * rng.integers(0, 2, shape) - 1 for shape in ((k,), (k, heads * dim)))
    values = (x @ w).reshape(heads, dim)
    low, high = (of(values, axis=-1, keepdims=True) for of in (np.min, np.max))
    step = (high - low) / 15
    ties = ((values - low) * 15 * 2) % (2 * (high - low)) == high - low
    found = np.linalg.norm(step * ties) / np.linalg.norm(values)
    assert 0 < found < ties_in_cache(Precision(1, 1), k, 4)
    assert ties_in_cache(Precision(4, 8), k, 4) < 0.01
