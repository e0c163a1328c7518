"""Exported directories: read back to the same codes, scales and zeros; what the format does not hold is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from bipolar_jax.models.exporters import export_compressed_tensors
from bipolar_jax.models.exporters.huggingface_config import model_type
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.models.loaders.huggingface.config import read_config
from bipolar_jax.nn import quantize_model
from bipolar_jax.quantize import Precision
from tests.models.loaders import tiny_quantized as formats
from tests.models.loaders.golden import checkpoints as golden_checkpoints
from tests.models.loaders.test_quantized_formats import CASES, maker
from tests.support import tiny_checkpoints as tiny

GOLDEN = golden_checkpoints.read()


@pytest.mark.parametrize("case", ["gptq v2, act-order", "pack-quantized, aligned 5 bits with zeros, W5A8", "bitnet"])
def test_exports_are_read_back_as_they_were(case, tmp_path):
    """Every leaf of the model, the tokenizer and the ids; the float layers too."""
    config, options, _ = CASES[case]
    formats.write(tmp_path / "low", config, maker(**options))
    loaded = load_huggingface(tmp_path / "low")
    export_compressed_tensors(tmp_path / "out", loaded)
    again = load_huggingface(tmp_path / "out")
    assert again.tokenizer.to_str() == loaded.tokenizer.to_str()
    assert again.model.config == loaded.model.config
    first, second = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(each.model)}
        for each in (loaded, again)
    )
    planes = [name for name in first if "planes" in name or "scale" in name or "order" in name]
    assert planes
    if case == "bitnet":  # ternary weights are 2 bits there
        up, other = (each.model.layers.ffn.up_proj.kernel.get_value() for each in (loaded, again))
        np.testing.assert_allclose(up.dequantize(), other.dequantize(), rtol=1e-6)
        return
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def test_precisions_that_differ_are_groups_of_names(tmp_path):
    loaded = load_huggingface(tiny.write_huggingface(tiny.make("qwen2", tied=True), tmp_path / "float"))
    rules = [
        ("down_proj", Precision(8, 8, calibration="minmax", a_symmetric=True)),
        ("o_proj", Precision(3, None, 32, "minmax", "float")),
    ]
    packed = loaded.with_model(quantize_model(loaded.model, rules))
    export_compressed_tensors(tmp_path / "out", packed)
    again = load_huggingface(tmp_path / "out").model
    assert again.config == packed.model.config
    for path in (("attention", "o_proj"), ("ffn", "down_proj")):
        one, two = (getattr(getattr(model.layers, path[0]), path[1]) for model in (packed.model, again))
        assert one.precision == two.precision
        np.testing.assert_array_equal(one.kernel.get_value().planes, two.kernel.get_value().planes)
        np.testing.assert_allclose(one.kernel.get_value().dequantize(), two.kernel.get_value().dequantize(), rtol=1e-6)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in fields["quantization_config"]["ignore"]


@pytest.mark.parametrize("name", ["qwen3 0.6b", "mistral 0.1, a window"])
def test_norms_of_heads_and_windows_are_exported(name, tmp_path):
    config = GOLDEN[name].configs["5"]
    weights = golden_checkpoints.make_weights(config)
    loaded = load_huggingface(golden_checkpoints.write(tmp_path / "float", config, weights, np.float32, 1))
    packed = loaded.with_model(quantize_model(loaded.model, [("down_proj", Precision(4, 8, calibration="minmax"))]))
    export_compressed_tensors(tmp_path / "out", packed)
    again = load_huggingface(tmp_path / "out").model
    assert again.config == packed.model.config
    for first, second in zip(jax.tree.leaves(again), jax.tree.leaves(packed.model), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["gemma 3 1b", "phi 4 mini", "bitnet 2b", "qwen2, windows from layer 1"])
def test_other_architectures_are_not_exported(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[name].configs["5"]))
    with pytest.raises(ValueError, match=r"only models of the Llama family are exported: .*; this one has \w+="):
        model_type(read_config(tmp_path)[1])


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (Precision(4, 8, calibration="mse"), 'without an integer zero.*calibration "minmax"'),
        ("W4A8g32", "has integer groups"),
        (None, "no packed"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(precision, message, tmp_path):
    loaded = load_huggingface(tiny.write_huggingface(tiny.make(), tmp_path / "float"))
    packed = loaded if precision is None else loaded.with_model(quantize_model(loaded.model, [("up|gate", precision)]))
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(tmp_path / "out", packed)
    if precision is not None:
        with pytest.raises(ValueError, match="export the model before"):
            export_compressed_tensors(tmp_path / "out", prepare_for_inference(packed))
    assert not (tmp_path / "out" / "model.safetensors").exists()
