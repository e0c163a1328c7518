"""experiments/calibrate.py on a tiny model: results, checkpoints, resuming, errors."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.presets import preset
from configs import calibrate as calibrate_config
from configs.bench import rotation_blocks as rotation_blocks_config
from experiments import calibrate
from experiments.bench import rotation_blocks
from experiments.support import workdir
from tests.support import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("compiled_programs")
WINDOWS, LENGTH = 3, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoints.write_huggingface(tiny_checkpoints.make(tied=True), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    return path


def tiny_config(model, text, precisions="W3A8"):
    config = calibrate_config.get_config()
    config.model, config.text, config.precisions, config.sample_tokens = str(model), str(text), precisions, 0
    config.windows, config.window_length = WINDOWS, LENGTH
    config.calibration_windows, config.calibration_length, config.windows_per_step = 6, LENGTH, 3
    config.rotation_block = 4
    config.rounding.algorithm, config.reconstruction.epochs = "nearest", 0  # fewer programs to compile
    return config


@pytest.fixture(scope="module")
def run(model, text, compiled_programs, tmp_path_factory):
    """Workdir of a run that was killed in the second precision, and resumed."""
    folder = tmp_path_factory.mktemp("run")
    original = bj.compress.calibrate

    def killed(*arguments, on_block, **options):
        def stop(blocks):
            raise KeyboardInterrupt

        return original(*arguments, on_block=stop, **options)

    config = tiny_config(model, text)
    config.rounded = "W3A8"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bj.compress, "calibrate", killed)
        calibrate.main(config, folder)
    assert (folder / "W3A8.blocks" / "block_00000.safetensors").is_file()
    tokens = np.load(folder / "calibration_tokens.npy")
    calibrate.main(config, folder)
    assert np.array_equal(np.load(folder / "calibration_tokens.npy"), tokens)
    return folder


def test_the_result_has_the_fields_of_quantize_and_every_windows_loss(run):
    result = json.loads((run / workdir.RESULT_NAME).read_text())
    assert list(result["precisions"]) == list(result["rounded"]) == ["W3A8"]
    assert result["rounded"]["W3A8"]["perplexity"] != result["precisions"]["W3A8"]["perplexity"]
    assert "checkpoint" not in result["rounded"]["W3A8"]
    for row in (result["baseline"], result["rounded"]["W3A8"], result["precisions"]["W3A8"]):
        assert np.exp(np.mean(row["window_losses"])) == pytest.approx(row["perplexity"], rel=1e-5)
        assert row["standard_error"] > 0
    assert result["precisions"]["W3A8"]["peak_bytes"] > 0
    assert result["precisions"]["W3A8"]["seconds"]["quantize"] > 0
    assert result["settings"]["rounding"]["algorithm"] == "nearest"
    assert (run / "perplexity.png").is_file()


def test_the_checkpoint_gives_the_reported_perplexity_without_options(run, text):
    packed = load_pretrained(run / "W3A8.safetensors")
    ids = packed.tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    again = perplexity(packed.model, ids, windows=WINDOWS, window_length=LENGTH)
    assert again.perplexity == json.loads((run / workdir.RESULT_NAME).read_text())["precisions"]["W3A8"]["perplexity"]
    assert not (run / "W3A8.blocks").exists()


@pytest.mark.covered("planes, by compress/rounding; caches, by models/kv_cache")
def test_a_row_may_be_the_high_planes_of_more_bits_read_with_a_quantized_cache(model, text, tmp_path):
    config = tiny_config(model, text, "W2A8")
    config.rounded_bits, config.cache_bits, config.rotation = 4, 8, "none"
    calibrate.main(config, tmp_path)
    packed = load_pretrained(tmp_path / "W2A8.safetensors")
    assert str(packed.model.layers.ffn.down_proj.precision) == "W2A8"
    ids = packed.tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    again = perplexity(packed.model, ids, windows=WINDOWS, window_length=LENGTH, cache_bits=8)
    assert (
        again.perplexity == json.loads((tmp_path / workdir.RESULT_NAME).read_text())["precisions"]["W2A8"]["perplexity"]
    )


def test_tokens_and_rules_come_from_files(model, text, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(WINDOWS * LENGTH * 3).reshape(-1, LENGTH) % 300)
    (tmp_path / "rules.json").write_text('[["down_proj", null], ["o_proj", "W8A8"]]')
    config = tiny_config(model, text, "W4A8g16")
    config.calibration_text, config.rules = str(tmp_path / "ids.npy"), str(tmp_path / "rules.json")
    config.rotation = "none"
    calibrate.main(config, tmp_path / "run")
    layers = load_pretrained(tmp_path / "run" / "W4A8g16.safetensors").model.layers
    assert str(layers.attention.o_proj.precision) == "W8A8"
    assert str(layers.attention.q_proj.precision) == "W4A8g16"
    assert not isinstance(layers.ffn.down_proj, bj.nn.Linear)
    (tmp_path / "rules.json").write_text('{"down_proj": "W8A8"}')
    with pytest.raises(ValueError, match="has no rules: write a list"):
        calibrate.main(config, tmp_path / "run")
    (tmp_path / "rules.json").unlink()
    with pytest.raises(ValueError, match=r"config.rules is .*rules.json, which is no file"):
        calibrate.main(config, tmp_path / "run")


def test_too_short_a_calibration_text_is_named(model, text, tmp_path):
    config = tiny_config(model, text)
    config.calibration_text, config.calibration_windows = str(text), 10**5
    with pytest.raises(ValueError, match="100000 windows of 16 need"):
        calibrate.main(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotation", "half", "config.rotation is 'half': choose from full, foldable, none"),
        ("calibration_windows", 0, "must be at least 1"),
        ("rounding.asymmetry", 2.0, "asymmetry must be from 0 to 1"),
        ("rounded_bits", 2, "W3A8g8 does not have the high planes of config.rounded_bits=2"),
        ("rounding.grid", "symmetric", "not one of integer groups, as of W3A8g8"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(text, tmp_path, field, value, message):
    config = tiny_config("no model", text, "W3A8g8")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        calibrate.main(config, tmp_path)


def test_windows_of_other_runs_are_refused(model, text, tmp_path):
    config = tiny_config(model, text)
    np.save(tmp_path / "calibration_tokens.npy", np.zeros((2, 5), np.int32))
    with pytest.raises(ValueError, match=r"windows of shape \(2, 5\), asked for are \(6, 16\): delete it"):
        calibrate.main(config, tmp_path)


def test_the_rotation_block_is_a_number_the_most_or_the_kernels():
    config, pretrained = calibrate_config.get_config(), types.SimpleNamespace(model=types.SimpleNamespace())
    pretrained.model.config = preset("llama-3-8b")
    for setting, block in ((0, None), (256, 256), (-1, 16), (-2, -2)):  # the last is refused by `hadamard`
        config.rotation_block = setting
        assert calibrate.rotation_block(config, pretrained) == block


@pytest.mark.covered("rotations of blocks, by compress/rotations; comparisons, by test_compare_methods.py")
def test_sizes_of_blocks_are_compared(model, text, tmp_path):
    config = rotation_blocks_config.get_config()
    config.model, config.text, config.windows, config.window_length = str(model), str(text), WINDOWS, LENGTH
    config.precisions, config.blocks = "W8A8", "none,4"
    rotation_blocks.main(config, tmp_path)
    errors = json.loads((tmp_path / workdir.RESULT_NAME).read_text())["squared_error"]
    assert errors["none"] == {"W8A8": 1.0}
    assert 0.3 < errors["4"]["W8A8"] < 3
    config.blocks = "none,all"
    with pytest.raises(ValueError, match="config.blocks has 'all': write numbers"):
        rotation_blocks.main(config, tmp_path)


@pytest.mark.parametrize(
    ("precisions", "changes", "epochs"),
    [
        (["W2A8g64"], {}, 8),
        (["W3A16"], {}, 8),
        (["W4A4g64"], {}, 8),
        (["W4A8g64"], {}, None),
        (["W8A8", "W2A8"], {}, 8),
        (["W2A8"], {"cache_bits": 8}, None),
        (["W2A8"], {"rounded_bits": 8}, None),
        (["W2A8"], {"rounding.nested": (2,)}, None),
        (["W4A8"], {"reconstruction.epochs": 2}, 2),
        (["W2A8"], {"reconstruction.epochs": 0}, None),
    ],
)
def test_blocks_learn_where_that_suits_the_precision_unless_told_otherwise(precisions, changes, epochs):
    config = calibrate_config.get_config()
    config.reconstruction.code_rate = 0.5
    config.update_from_flattened_dict(changes)
    precisions = [bj.Precision.parse(text) for text in precisions]
    chosen = calibrate.reconstruction_of(config, precisions, experts=False)
    assert chosen == (bj.compress.Reconstruction(epochs, code_rate=0.5) if epochs else None)
    if config.reconstruction.epochs == -1:
        assert calibrate.reconstruction_of(config, precisions, experts=True) is None
