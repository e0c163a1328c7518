"""A Qwen3 of one bit a weight, in groups of 128 (Q1_0), as a GGUF file has it, at A16 and A8."""

from __future__ import annotations

import numpy as np
import pytest

from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.loaders import load_gguf
from tests.models.loaders.gguf_integers import tiny_blocks as tiny

IDS = np.array([[5, 300, 17, 42, 8], [1, 2, 3, 4, 5]], np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3") / "model.gguf"
    layers = [dict.fromkeys(tiny.NAMES, "Q1_0")] * 2
    return tiny.write(path, layers, "Q1_0", tied=True, heads=(8, 2), arch="qwen3")


@pytest.fixture(scope="module")
def logits(path):
    """Of the dequantized weights."""
    model = load_gguf(path).model
    assert model.config.qk_norm
    return np.asarray(model(IDS))


def test_float_activations_give_the_logits_of_the_dequantized_weights(path, logits):
    found = load_gguf(path, activations=16).model(IDS)
    np.testing.assert_allclose(found, logits, rtol=0, atol=2e-4 * np.abs(logits).max())


def test_activations_of_8_bits_are_close(path, logits):
    prepared = prepare_for_inference(load_gguf(path, activations=8).model)
    assert str(prepared.layers.attention.qkv_proj.precision).startswith("W1A8g128")
    difference = np.linalg.norm(np.asarray(prepared(IDS)) - logits)
    assert 0 < difference < 0.1 * np.linalg.norm(logits)
