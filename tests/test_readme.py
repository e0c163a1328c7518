"""The examples of README.md and of the READMEs of loaders and training run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.models.loaders import tiny_quantized
from tests.models.loaders.test_quantized_formats import CASES, maker
from tests.support import tiny_checkpoints

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LOADERS = ROOT / "bipolar_jax" / "models" / "loaders" / "README.md"
TRAINING = ROOT / "bipolar_jax" / "nn" / "training" / "README.md"


def example(document: Path, having: str) -> str:
    """The first Python example of a document that contains the text `having`."""
    examples = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    return next(code for code in examples if having in code)


def names_after(code: str) -> dict:
    """Runs the code; returns the names that it defines."""
    names = {}
    exec(code, names)
    return names


def test_a_loaded_model_is_quantized_and_writes(tmp_path):
    path = tiny_checkpoints.write_gguf(tiny_checkpoints.make(), tmp_path / "model.gguf")
    code = example(README, "load_pretrained").replace('"model.gguf"', repr(str(path)))
    assert "128, 512," in code
    assert "text, rules)" in code
    nearest = "text, rules, method=bj.compress.Rounding('nearest'))"  # fewer programs to compile
    names = names_after(code.replace("128, 512,", "2, 8,").replace("text, rules)", nearest))
    assert str(names["model"].model.layers.attention.qkv_proj.precision) == "W4A8g64"
    assert str(names["model"].model.embed.precision) == "W8A16"


def test_a_low_bit_checkpoint_writes(tmp_path, capsys):
    config, options, precision = CASES["awq"]
    tiny_quantized.write(tmp_path, config, maker(**options))
    code = example(LOADERS, "load_pretrained").replace('"DIRECTORY"', repr(str(tmp_path)))
    assert "max_new_tokens=32" in code
    names = names_after(code.replace("max_new_tokens=32", "max_new_tokens=2"))
    assert str(names["model"].model.layers.ffn.down_proj.precision) == precision
    assert capsys.readouterr().out.strip()


def test_arrays_and_layers_are_quantized_and_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_after(example(README, "bj.quantize(kernel"))
    assert names["y"].shape == (2, 7, 128)
    assert names["logits"].shape == (2, 7, 10)
    assert (names["w"].bits, names["coarse"].bits, names["w3"].bits) == (4, 2, 3)
    layers = names["quantized"].layers
    assert [str(layers[i].precision) for i in (0, 2)] == ["W8A8", "W4A8g64"]


@pytest.mark.usefixtures("standard_promotion")  # of optax
def test_a_student_is_distilled_and_packed():
    names = names_after(example(README, "bj.quantization_aware(teacher"))
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    assert str(names["packed"].layers[0].precision) == "W2A4"
    assert_same_logits(names)


@pytest.mark.usefixtures("standard_promotion")  # of optax
def test_a_linen_cnn_is_trained_and_packed():
    names = names_after(example(TRAINING, "class CNN"))
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    expected = jax.jit(names["model"].apply)(names["variables"], names["images"])
    np.testing.assert_array_equal(names["logits"], expected)
    assert names["packed"]["params"]["Dense_0"]["kernel"].bits == 1


@pytest.mark.usefixtures("standard_promotion")  # of optax
def test_attention_is_trained_by_path_rules():
    names = names_after(example(TRAINING, "nnx.MultiHeadAttention"))
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    packed = names["packed"].layers
    assert str(packed[1].query.precision) == "W1.58A8"
    assert str(packed[2].precision) == "W2A4"
    assert_same_logits(names)


def assert_same_logits(names: dict) -> None:
    """The packed model computes the trained model's logits to the bit."""
    logits = [jax.jit(lambda model, x: model(x))(names[model], names["x"]) for model in ("packed", "student")]
    np.testing.assert_array_equal(*logits)
