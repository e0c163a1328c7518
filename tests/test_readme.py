"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np

README = Path(__file__).parent.parent / "README.md"


def names_after(having: str) -> dict:
    """Runs the first example with these words in it."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(next(example for example in examples if having in example), names)
    return names


def test_a_plain_nnx_model_is_quantized_by_rules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_after("bj.quantize(kernel")
    assert names["y"].shape == (2, 7, 128)
    assert names["logits"].shape == (2, 7, 10)
    assert (names["w"].bits, names["coarse"].bits, names["w3"].bits) == (4, 2, 3)
    layers = names["quantized"].layers
    assert [str(layers[i].precision) for i in (0, 2)] == ["W8A8", "W4A8g64"]


def test_a_linen_cnn_is_trained_and_packed():
    names = names_after("class CNN")
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    expected = jax.jit(names["model"].apply)(names["variables"], names["images"])
    np.testing.assert_array_equal(names["logits"], expected)
    assert names["packed"]["params"]["Dense_0"]["kernel"].bits == 1


def test_layers_are_imported_into_a_model():
    names = names_after("bj.quantization_aware(teacher")
    assert names["distillation"][-1] < 0.7 * names["distillation"][0]
    assert names["same"].all()
    packed = names["packed"].layers
    assert str(packed[1].query.precision) == "W1.58A8"
    assert str(packed[2].precision) == "W2A4"
