"""experiments/evaluation/qwix_methods.py: what qwix rounds, of which inputs; and its rows beside ours."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from experiments import compare_methods
from experiments.support.config_files import load_config
from experiments.support.workdir import RESULT_NAME
from tests.support import tiny_checkpoints

qwix_methods = pytest.importorskip("experiments.evaluation.qwix_methods", reason="qwix is not installed")
pytestmark = pytest.mark.usefixtures("compiled_programs")


def test_gptq_and_awq_lose_less_of_the_output_than_rounding_to_nearest():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    x = rng.standard_normal((64, 8)) @ rng.standard_normal((8, 8)) * np.geomspace(0.1, 10, 8)
    products, magnitudes = jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(np.abs(x).mean(axis=0), jnp.float32)
    errors, precision = {}, bj.Precision.parse("W4A16g4f")
    for peer in qwix_methods.PEERS:
        found = qwix_methods.rounded_rows(rows, products, magnitudes, peer, precision)
        errors[peer] = float(np.square(x @ np.asarray(found - rows, np.float64).T).sum())
        if peer == "ptq":
            scale = np.abs(rows).reshape(4, 2, 4).max(axis=-1, keepdims=True) / 7.5
            expected = np.round(0.99999 * rows.reshape(4, 2, 4) / scale) * scale  # 7.5 becomes 7
            np.testing.assert_allclose(found, expected.reshape(4, 8), rtol=1e-6)
    for bits, largest in ((3, 3.5), (6, 31.5)):
        found = qwix_methods.rounded_rows(rows, products, magnitudes, "ptq", bj.Precision(bits))
        scale = np.abs(rows).max(axis=-1, keepdims=True) / largest
        expected = np.round(rows / scale) * scale
        inside = np.abs(rows) < largest * scale * 0.999  # the largest itself is halfway between two numbers
        np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-6)
    assert 0 < errors["gptq"] < errors["ptq"]
    assert 0 < errors["awq"] < errors["ptq"]


def test_tokens_are_rounded_by_their_largest_magnitude():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((2, 3, 8)).astype(np.float32), rng.standard_normal((8, 5)).astype(np.float32)
    found = qwix_methods.int8_tokens_dot_general(jnp.asarray(x), jnp.asarray(w), (((2,), (0,)), ((), ())))
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127.5
    np.testing.assert_allclose(found, np.round(0.99999 * x / scale) * scale @ w, rtol=1e-5, atol=1e-5)


def config_of(tmp_path):
    config = load_config("compression/compare_methods").config
    model = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(tied=True), tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    config.model, config.text, config.precisions = str(model), str(tmp_path / "text.txt"), "W4A8g32"
    config.calibration_text = config.text
    config.windows, config.window_length, config.calibration_windows, config.calibration_length = 3, 16, 4, 16
    config.compared, config.against, config.seeds = "qwix_ptq,qwix_awq", "qwix_ptq", "0"
    return config


@pytest.mark.covered("rows of qwix, by the tests beside; the program, by test_compare_methods.py")
def test_methods_of_qwix_are_compared(tmp_path):
    config = config_of(tmp_path)
    compare_methods.main(config, tmp_path / "run")
    result = json.loads((tmp_path / "run" / RESULT_NAME).read_text())
    summary = result["summary"]["W4A8g32"]
    assert list(summary) == ["qwix_ptq", "qwix_awq"]
    assert summary["qwix_awq"]["difference"]["mean"] != 0
    baseline = result["baseline"]["perplexity"]
    for name in summary:
        assert 0 < abs(summary[name]["perplexity"] / baseline - 1) < 0.2
    (row,) = result["methods"]["qwix_ptq"]["W4A8g32"].values()
    (awq,) = result["methods"]["qwix_awq"]["W4A8g32"].values()
    # AWQ keeps a number of 16 bits for each input of q, k, v, gate, up; o; and down, of three layers.
    inputs = 5 * tiny_checkpoints.HIDDEN + tiny_checkpoints.HEADS * tiny_checkpoints.HEAD_DIM + tiny_checkpoints.FFN
    assert awq["bytes"] - row["bytes"] == 2 * inputs * tiny_checkpoints.LAYERS
    # Of a weight, 4 bits and its share of a scale of 16 take the place of 32 bits.
    weights = sum(math.prod(shape) for shape in matrices()) * tiny_checkpoints.LAYERS
    assert result["baseline"]["bytes"] - row["bytes"] > weights * (32 - 4.5) / 8


def matrices():
    """Shapes of the matrices of a layer."""
    hidden, ffn, context = tiny_checkpoints.HIDDEN, tiny_checkpoints.FFN, 96
    return [(hidden, context), (hidden, 32), (hidden, 32), (context, hidden), *[(hidden, ffn)] * 3]


@pytest.mark.parametrize(("peer", "precision"), [("gptq", "W3A8"), ("ptq", "W4A4"), ("awq", "W1.58A8")])
def test_precisions_that_qwix_has_not_are_refused(tmp_path, peer, precision):
    config = config_of(tmp_path)
    config.peer, config.precisions = peer, precision
    with pytest.raises(
        ValueError, match=f"is not compared with qwix's {peer}: give {'4, 8' if peer == 'gptq' else '2'}"
    ):
        qwix_methods.main(config, tmp_path / "run")


def test_statistics_are_of_what_enters_the_float_layers(tmp_path):
    from tests.support.tiny_transformers import CONFIG, random_ids, random_transformer

    model = random_transformer(CONFIG)
    carry = qwix_methods.enter_blocks(model, jnp.asarray(random_ids(2, 5)), None)
    block = model.block(0)
    x = block.attention_norm(model.stream(carry)).reshape(10, -1)
    products, magnitudes, count = qwix_methods._sums(model, block, carry, model.block_sites, CONFIG.hidden_size)
    np.testing.assert_allclose(products, jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(magnitudes / count, jnp.abs(x).mean(axis=0), rtol=1e-5)
