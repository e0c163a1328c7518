"""Spans of activations: the error that the search sums, and what it chooses for a model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.compress.activation_spans import SPANS, output_errors
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.pretrained import PretrainedModel
from tests.support import tiny_checkpoints
from tests.support.tiny_transformers import ARCHITECTURES, random_ids, random_transformer


def clipped(x: np.ndarray, bits: int, span: float) -> np.ndarray:
    """Tokens on the grid that spans a part of their range and zero, in float64."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0) * span, np.maximum(x.max(-1, keepdims=True), 0) * span
    step = (high - low) / (2**bits - 1)
    zero = np.floor(0.5 - low / step)
    return (np.clip(np.floor(x / step + 0.5) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize("columns", [3, 40])  # fewer than inputs, or more: then a Gram matrix serves
def test_errors_are_those_of_the_outputs(columns):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(30, 12)), rng.normal(size=(12, columns))
    weights = rng.uniform(0.5, 2, 30)
    found = jax.jit(output_errors, static_argnums=3)(
        *(jnp.asarray(a, jnp.float32) for a in (x, weights, w)), bj.BipolarFormat(3)
    )
    wanted = [np.sum(weights[:, None] * ((clipped(x, 3, span) - x) @ w) ** 2) for span in SPANS]
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    assert np.argmin(wanted) > 0


@pytest.mark.covered("experiments/test_calibrate.py")
def test_models_get_a_span_for_each_input_of_a_block(tmp_path):
    tokenizer = tiny_checkpoints.make_tokenizer("smollm")
    config = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=tokenizer.get_vocab_size())
    model, tokens = random_transformer(config), random_ids(4, 16, seed=1)
    rules = [("down", "W4A8"), ("o_proj", bj.Precision(4, 3, a_span=0.9)), ("layers/", "W4A3s")]
    packed = bj.compress.calibrate(model, tokens, rules, method=Rounding("nearest"))
    layers = packed.layers
    found = [layers.attention.q_proj, layers.attention.v_proj, layers.ffn.gate_proj, layers.ffn.up_proj]
    spans = [layer.precision.a_span for layer in found]
    assert spans[0] == spans[1] < 1
    assert spans[2] == spans[3] < 1
    assert layers.attention.o_proj.precision.a_span == 0.9
    assert layers.ffn.down_proj.precision.a_span == 1
    save_model(tmp_path / "packed.safetensors", PretrainedModel(packed, tokenizer))
    loaded = load_model(tmp_path / "packed.safetensors").model
    assert loaded.layers.ffn.gate_proj.precision == layers.ffn.gate_proj.precision
    np.testing.assert_array_equal(loaded(tokens), packed(tokens))
