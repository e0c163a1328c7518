"""Smoothing: the factors of both papers in float64 numpy, and models whose function stays the same."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.compress.smoothing import Smoothing, smooth
from bipolar_jax.compress.smoothing.factors import awq_factors, smoothquant_factors
from tests.support.tiny_transformers import ARCHITECTURES, random_ids, random_transformer

TOKENS = random_ids(6, 16, seed=1)


def a_layer(k: int = 12, n: int = 9):
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, k)) * np.exp(1.5 * rng.normal(size=k)), rng.normal(size=(k, n))


def float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_factors(alpha):
    x, w = a_layer()
    owners = np.arange(12) % 6  # two inputs share a factor
    found = smoothquant_factors(*float32(np.abs(x).max(0), w), alpha, jnp.asarray(owners), 6)
    wanted = [np.abs(x[:, owners == i]).max() ** alpha / np.abs(w[owners == i]).max() ** (1 - alpha) for i in range(6)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_awq_factors():
    """The alpha whose rounded weights have the least error over all tokens; rounding spans from minimum to maximum."""

    def rounded(w):
        low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
        step = (high - low) / 15
        zero = np.floor(0.5 - low / step)
        return (np.clip(np.floor(w / step + 0.5) + zero, 0, 15) - zero) * step

    x, w = a_layer()
    hessian = x.T @ x / len(x)
    found = jax.jit(awq_factors, static_argnums=(3, 4, 6))(
        *float32(np.abs(x).mean(0), w, hessian), bj.Precision.parse("W4A16"), 10, jnp.arange(12), 12
    )
    candidates = []
    for alpha in np.arange(10) / 10:
        s = np.abs(x).mean(0) ** alpha
        s /= np.sqrt(s.max() * s.min())
        candidates.append((np.sum(((x / s) @ rounded(s[:, None] * w) - x @ w) ** 2), s))
    error, wanted = min(candidates, key=lambda found: found[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert error < candidates[0][0]


@pytest.mark.parametrize("algorithm", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
@pytest.mark.sample(1)
def test_models_stay_the_same_and_lose_less(name, algorithm):
    """Of a model with outliers in the outputs of its norms: gains of some channels are large, their weights small."""
    config = ARCHITECTURES[name]
    model = random_transformer(config)
    outliers = jnp.where(jnp.arange(config.hidden_size) % 8 == 3, 30.0, 1.0)
    for norm, layers in (
        (model.layers.attention_norm, [getattr(model.layers.attention, f"{each}_proj") for each in "qkv"]),
        (model.layers.ffn_norm, [getattr(model.layers.ffn, each, None) for each in ("gate_proj", "up_proj")]),
    ):
        for variable in (norm.scale, getattr(norm, "bias", None)):
            if variable is not None:
                variable[...] = variable[...] * outliers[None]
        for layer in filter(None, layers):
            layer.kernel[...] = layer.kernel[...] / outliers[None, :, None]
    smoothed = smooth(model, TOKENS, "W4A6", method=Smoothing(algorithm))
    ids = random_ids(4, 16, seed=2)
    wanted = model(ids)
    np.testing.assert_allclose(smoothed(ids), wanted, atol=1e-4 * np.abs(wanted).max())

    def loss(float_model):
        return float(jnp.mean((bj.quantize_model(float_model, [("layers/", "W6A6")])(ids) - wanted) ** 2))

    assert loss(smoothed) < 0.7 * loss(model)


def test_what_cannot_be_smoothed_is_named():
    model = random_transformer(ARCHITECTURES["llama"])
    with pytest.raises(ValueError, match="the model is rotated"):
        smooth(bj.compress.rotate(model, key=jax.random.key(0)), TOKENS, "W4A8")
    with pytest.raises(ValueError, match=r"q_proj is a Linear, not a float nnx.Linear"):
        smooth(bj.quantize_model(model, [("q_proj", "W4A8")]), TOKENS, "W4A8")
    with pytest.raises(ValueError, match=r"needs tokens \[windows, length\]"):
        smooth(model, TOKENS[0], "W4A8")
    for fields, message in (
        ({"algorithm": "gptq"}, "algorithm must be one of"),
        ({"alpha": 2}, "alpha must be"),
        ({"steps": 1}, "steps must be"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(Smoothing(), **fields)
