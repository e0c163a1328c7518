"""Exported GGUF files: the loader, and gguf-py's reader, read the same integers; what GGUF does not hold is refused."""

from __future__ import annotations

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.compress import rotate
from bipolar_jax.format import TERNARY
from bipolar_jax.models.config import RopeScaling, TransformerConfig
from bipolar_jax.models.exporters import export_compressed_tensors, export_gguf
from bipolar_jax.models.exporters.gguf_blocks import encode
from bipolar_jax.models.exporters.gguf_metadata import rope_factors
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.loaders import load_gguf, load_huggingface, load_pretrained
from bipolar_jax.nn import quantize_model
from bipolar_jax.nn.compressible import layer_at
from bipolar_jax.packing import quantize
from bipolar_jax.quantize import Precision
from tests.fuzz.readers import with_sentencepiece
from tests.models.loaders.gguf_integers import tiny_blocks
from tests.models.loaders.test_gguf import llama3_factors
from tests.support import tiny_checkpoints as tiny

# What is quantized, the type that is asked for, and the type that is written; None is refused.
GRIDS = {
    "zero points": (Precision(4, None, 32, "minmax", "float"), None, "Q4_1"),
    "zero points, as bytes": (Precision(4, None, 64, "minmax", "float"), "Q8_0", "Q8_0"),
    "symmetric, 3 bits": (Precision(3, None, None, "mse"), None, "Q4_0"),
    "symmetric, 4 bits": (Precision(4, None, 32, "mse", "float"), "Q5_0", "Q5_0"),
    "symmetric, 7 bits": (Precision(7, None, 32, "mse", "float"), None, "Q8_0"),
    "ternary": (Precision(TERNARY, None, 64, scales="float"), None, "Q4_0"),
    "one bit": (Precision(1, None, 32, scales="float"), None, "Q4_0"),
    "five bits": (Precision(5, None, 32, "minmax", "float"), None, "Q5_1"),
    "integer groups": (Precision(4, None, 32), None, "Q4_1"),
    "integer groups, as bytes": (Precision(4, None, 32), "Q8_0", "Q8_0"),
    "eight bits": (Precision(8, None, None, "mse"), None, None),
    "small groups": (Precision(4, None, 16, "minmax", "float"), None, None),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", GRIDS)
def test_blocks_hold_the_integers_of_grids(case):
    precision, asked, type_name = GRIDS[case]
    weights = np.random.default_rng(0).standard_normal((128, 8)).astype(np.float32)
    array = quantize(weights, precision.w_bits, -2, precision.group_size, precision.calibration, precision.scales)
    if type_name is None:
        with pytest.raises(ValueError, match="such as W4A16g32"):
            encode(array, asked)
        return
    blocks = encode(array, asked)
    assert blocks.type_name == type_name
    read = gguf.quants.dequantize(blocks.raw, gguf.GGMLQuantizationType[type_name])
    ours = np.asarray(array.dequantize()).T
    error = np.linalg.norm(read - ours) / np.linalg.norm(ours)
    assert error == pytest.approx(blocks.error, rel=1e-3)
    assert 0 < error < 1e-3
    # The integers are those of the array: weights of a group that are equal or not stay so.
    for row, other in zip(read.reshape(-1, 32), ours.reshape(-1, 32), strict=True):
        np.testing.assert_array_equal(np.unique(row, return_inverse=True)[1], np.unique(other, return_inverse=True)[1])


@pytest.mark.sample(2)
@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_imported_blocks_are_written_back_bit_for_bit(type_name, tmp_path):
    names = ("attn_q", "attn_k", "ffn_up")
    source = tiny_blocks.write(tmp_path / "in.gguf", [dict.fromkeys(names, type_name)], "Q4_1", tied=True)
    loaded = load_gguf(source, activations=8)
    report = export_gguf(tmp_path / "out.gguf", loaded)
    assert report.error == 0
    before, after = (_tensors(tmp_path / f"{name}.gguf") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for name, (kind, data) in before.items():
        if name != "rope_freqs.weight":
            assert after[name][0] == kind, name
            np.testing.assert_array_equal(after[name][1], data, err_msg=name)


def _tensors(path):
    """Types and bytes, by gguf-py's own reader."""
    return {each.name: (each.tensor_type.name, each.data) for each in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def floats(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny.make(
        request.param, tied=request.param == "qwen2", pre={"llama": "llama-bpe"}.get(request.param, "qwen2")
    )
    return load_huggingface(tiny.write_huggingface(checkpoint, folder / "float"))


def test_files_are_read_back(floats, tmp_path):
    """Tokenizer, config, float layers exactly; packed ones up to the roundings that the report states."""
    rules = [("q_proj", "W4A8g32"), ("up_proj", Precision(3, 8, None, "mse")), ("embed", Precision(4, None, 32))]
    packed = floats.with_model(quantize_model(floats.model, rules))
    report = export_gguf(tmp_path / "out.gguf", packed)
    assert {tensor.type_name for tensor in report.tensors} == {"Q4_0", "Q4_1"}
    assert 0 < report.error < 2e-3
    assert "Q4_1: 4 tensors, scales rounded by at most" in str(report)
    again = load_gguf(tmp_path / "out.gguf", activations=8)
    assert again.model.config == packed.model.config
    for text in ("the quick brown fox, it's 1984\n\n  <tool> naïve 東京<|turn|>", " a  b"):
        assert again.encode(text) == packed.encode(text)
    for path in ("attention/q_proj", "ffn/up_proj"):
        ours, read = (layer_at(each.model.block(1), path) for each in (packed, again))
        expected, numbers = (np.asarray(each.kernel.get_value().dequantize()) for each in (ours, read))
        assert np.linalg.norm(expected - numbers) <= 1.01 * report.error * np.linalg.norm(expected)
        np.testing.assert_array_equal(*(each.bias if each.bias is None else each.bias[...] for each in (ours, read)))
    for path in ("attention/o_proj", "ffn/down_proj"):
        np.testing.assert_array_equal(*(layer_at(each.model.block(1), path).kernel[...] for each in (packed, again)))


def test_sentencepiece_tokenizers_and_templates_are_written(tmp_path):
    checkpoint = with_sentencepiece(tiny.make())
    loaded = load_gguf(tiny.write_gguf(checkpoint, tmp_path / "in.gguf"))
    export_gguf(tmp_path / "out.gguf", loaded.with_model(quantize_model(loaded.model, [("up_proj", "W4A8g32")])))
    again = load_gguf(tmp_path / "out.gguf")
    assert again.chat_template == loaded.chat_template
    assert again.model.config == loaded.model.config
    for text in ("the quick  fox", "é", ""):
        assert again.encode(text) == loaded.encode(text)


@pytest.mark.sample(1)
def test_what_files_do_not_hold_is_refused(floats, tmp_path):
    packed = floats.with_model(quantize_model(floats.model, [("up|gate", "W4A8g32")]))
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match="no packed layer: quantize or calibrate"):
        export_gguf(out, floats)
    with pytest.raises(ValueError, match="export the model before"):
        export_gguf(out, prepare_for_inference(packed))
    eight = floats.with_model(quantize_model(floats.model, [("down", Precision(8, 8, None, "minmax"))]))
    with pytest.raises(ValueError, match=r"blk.0.ffn_down: W8 in groups of 96 fits none of"):
        export_gguf(out, eight)
    with pytest.raises(ValueError, match=r"blk.0.ffn_gate: W4 in groups of 32 fits none of Q4_0"):
        export_gguf(out, packed, type_name="Q4_0")
    with pytest.raises(ValueError, match="type 'Q6_K' is not written"):
        export_gguf(out, packed, type_name="Q6_K")
    with pytest.raises(ValueError, match="more than most_error=1e-05"):
        export_gguf(out, packed, most_error=1e-5)
    packed.model.config = dataclasses.replace(packed.model.config, logit_softcap=30.0)
    with pytest.raises(ValueError, match="this one has logit_softcap=30.0"):
        export_gguf(out, packed)
    assert not out.exists()


@pytest.mark.parametrize("export", [export_gguf, export_compressed_tensors])
def test_rotations_are_folded_and_tied_models_untied(export, tmp_path):
    """The exported model computes the logits of the rotated one, whose table is rotated at run time."""
    tied = load_huggingface(tiny.write_huggingface(tiny.make(tied=True), tmp_path / "float"))
    rotated = rotate(tied.model, "foldable", key=jax.random.key(0))
    assert rotated.config.rotation.enters
    # One packed layer, so that logits differ by its rounded scales alone.
    packed = tied.with_model(quantize_model(rotated, [("o_proj", Precision(8, None, None, "minmax"))]))
    if export is export_gguf:
        packed = tied.with_model(quantize_model(rotated, [("o_proj", Precision(7, None, 32, "mse", "float"))]))
    export(tmp_path / "out.gguf", packed)
    again = load_pretrained(tmp_path / "out.gguf")
    assert again.model.config == dataclasses.replace(tied.model.config, tie_embeddings=False)
    ids = jnp.array([[5, 300, 17, 42, 8, 8, 101]])
    logits = jax.jit(lambda model: model(ids))
    np.testing.assert_allclose(logits(again.model), logits(packed.model), atol=2e-3)


def test_rotations_at_run_time_are_refused(tmp_path):
    tied = load_huggingface(tiny.write_huggingface(tiny.make(tied=True), tmp_path / "float"))
    full = tied.with_model(quantize_model(rotate(tied.model, "full", key=jax.random.key(0)), [("o_proj", "W4A16g32")]))
    with pytest.raises(ValueError, match='rotation="foldable"'):
        export_gguf(tmp_path / "full.gguf", full)


def test_llama3_frequencies_are_divisors():
    scaling = RopeScaling("llama3", 8.0, 64)
    config = TransformerConfig(32, 64, 1, 4, 2, tiny.HEAD_DIM, 96, 64, rope_scaling=scaling)
    np.testing.assert_allclose(rope_factors(config), llama3_factors(), rtol=1e-6)
