"""Whole models whose float groups become integer ones: every layer, its stated error, training, files."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import bipolar_jax as bj
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import Transformer
from tests.support.integer_products import normal
from tests.support.tiny_checkpoints import make_tokenizer

TOKENIZER = make_tokenizer("smollm")
# All layers are 48 x 48, so that they share programs.
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.get_vocab_size(),
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    ffn_size=48,
    context_length=64,
    tie_embeddings=True,
)
RULES = [
    ("embed", bj.Precision(8, None, 16)),
    ("v_proj", "W4A8"),
    ("o_proj", "W4A8g16"),
    ("up_proj", None),
    (".*", "W4A8g16f"),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return bj.quantize_model(Transformer(CONFIG, rngs=nnx.Rngs(0)), RULES)


@pytest.fixture(scope="module")
def converted(model):
    return bj.nn.with_integer_groups(model)


def test_every_layer_is_converted_or_its_reason_is_said(model, converted):
    result, report = converted
    by_path = {layer.path: layer for layer in report.layers}
    notes = {path: layer.note for path, layer in by_path.items() if layer.note}
    assert notes == {
        "embed": "more than 6 bits",
        "layers/attention/v_proj": "one scale a channel",
        "layers/attention/o_proj": "has integer groups",
    }
    names = ("attention/q_proj", "attention/k_proj", "ffn/gate_proj", "ffn/down_proj")
    assert set(by_path) - set(notes) == {f"layers/{name}" for name in names}
    before, after = (each.layers.attention.q_proj for each in (model, result))
    assert (str(before.precision), str(after.precision)) == ("W4A8g16f", "W4A8g16")
    expected, errors = before.kernel.get_value().to_integer_groups()
    jax.tree.map(np.testing.assert_array_equal, after.kernel.get_value(), expected)
    assert by_path["layers/attention/q_proj"].errors == tuple(errors.tolist())
    assert len(errors) == 2
    assert before.kernel.get_value().groups is None
    assert result.embed.embedding.get_value().planes is model.embed.embedding.get_value().planes
    lines = str(report).splitlines()
    assert len(lines) == 8
    assert f"layers/attention/q_proj  W4A8g16    {errors.mean():.2e}" in str(report)
    assert lines[1].split() == ["embed", "W8A16g16", "-", "-", "more", "than", "6", "bits"]


def test_a_converted_model_is_saved_and_stays_as_it_is(converted, tmp_path):
    result, _ = converted
    save_model(tmp_path / "model.safetensors", PretrainedModel(result, TOKENIZER))
    loaded = load_model(tmp_path / "model.safetensors").model
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(result))
    again, report = bj.nn.with_integer_groups(loaded)
    assert {layer.note for layer in report.layers} == {"has integer groups", "more than 6 bits", "one scale a channel"}
    kernel, same = (each.layers.ffn.down_proj.kernel.get_value() for each in (loaded, again))
    assert same.groups.scale is kernel.groups.scale


def test_weights_that_are_laid_out_for_a_device_are_refused(model):
    with pytest.warns(UserWarning, match="stay apart"):
        prepared = prepare_for_inference(model, layout="bytes")
    with pytest.raises(
        ValueError, match=r"layer layers/attention/\w+: Unpacked.* convert before prepare_for_inference"
    ):
        bj.nn.with_integer_groups(prepared)


def test_trained_layers_keep_their_products():
    """The roundings of training, with other scales; learned step sizes are scales like others from there on."""
    model = nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0)))
    trained = bj.quantization_aware(model, [(".*", "W4A8g16f")], learned_steps=True)
    packed = bj.quantize_model(trained)
    result, report = bj.nn.with_integer_groups(packed)
    (layer,) = result.layers
    assert (str(layer.precision), str(layer.trained.precision), layer.learned_steps) == ("W4A8g16", "W4A8g16", False)
    x = normal(3, 32)
    np.testing.assert_allclose(result(x), packed(x), atol=0.1)
    assert 0 < report.layers[0].errors[0] < 2e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "no packed layers"), (lambda: 3, "got a int: give an nnx.Mod")],
)
def test_other_models_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        bj.nn.with_integer_groups(make())
