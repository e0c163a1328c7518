"""experiments/compare_methods.py on a tiny model; means over draws."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments import compare_methods
from experiments.support.config_files import load_config
from experiments.support.paired_draws import NO_DRAW, mean_difference, mean_perplexity
from experiments.support.workdir import RESULT_NAME
from tests.support import tiny_checkpoints


def test_means_and_errors_are_those_of_draws():
    draws, against = {"0": [1.0, 2.0], "1": [1.2, 2.4]}, {"0": [0.9, 2.0], "1": [1.0, 2.2], "2": [9.0, 9.0]}
    perplexities = np.exp([1.5, 1.8])
    assert mean_perplexity(draws) == pytest.approx((perplexities.mean(), perplexities.std(ddof=1) / math.sqrt(2)))
    assert mean_difference(draws, against) == pytest.approx((0.125, 0.075))
    # What has no draws is paired with all: 0.55, 0.4 and 1.
    rounded = {NO_DRAW: [2.0, 2.0]}
    assert mean_difference(rounded, against | {"2": [1.0, 1.0]}) == pytest.approx((0.65, math.sqrt(0.0975 / 3)))
    with pytest.raises(ValueError, match="no draws in common: 0, 1 and 2, 3"):
        mean_difference(draws, {"2": [1.0, 1.0], "3": [1.0, 1.0]})
    with pytest.raises(ValueError, match="other numbers of windows"):
        mean_difference(draws, {"0": [1.0], "1": [1.0]})


def test_every_method_of_the_config_makes_a_config_of_calibrate():
    config = load_config("compression/compare_methods").config.lock()
    calibrate = load_config("calibrate").config
    for name, changes in config.methods.items():
        run = compare_methods._config_of(config, name, "7", "tokens.npy", with_rounding=False)
        assert set(run) - {"peer"} == set(calibrate), name
        assert (run.seed, run.calibration_text, run.rounded) == (7, "tokens.npy", "")
        assert run.get("peer") == changes.get("peer")
        for field, value in changes.items():
            if field not in ("suffix", "peer"):
                kept = run[field].to_dict() if hasattr(run[field], "to_dict") else run[field]
                wanted = calibrate[field].to_dict() | value.to_dict() if hasattr(value, "to_dict") else value
                assert kept == wanted, name
    assert config.rounding.to_dict() == calibrate.rounding.to_dict()


@pytest.fixture
def config(tmp_path):
    config = load_config("compression/compare_methods").config
    model = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(tied=True), tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    config.model, config.text, config.precisions = str(model), str(tmp_path / "text.txt"), "W3A8"
    config.windows, config.window_length, config.calibration_windows, config.calibration_length = 3, 16, 4, 16
    config.compared, config.against, config.seeds = "rounding,nearest,unrotated", "nearest", "0,1"
    config.rounding.algorithm = "nearest"  # fewer programs to compile
    return config.lock()  # as the command line leaves it


def _check_comparison(folder):
    result = json.loads((folder / RESULT_NAME).read_text())
    summary = result["summary"]["W3A8"]
    assert {name: row["draws"] for name, row in summary.items()} == {"rounding": 0, "nearest": 2, "unrotated": 2}
    losses = [result["methods"]["unrotated"]["W3A8"][seed]["window_losses"] for seed in "01"]
    others = [result["methods"]["nearest"]["W3A8"][seed]["window_losses"] for seed in "01"]
    expected = np.mean(losses) - np.mean(others)
    assert summary["unrotated"]["difference"]["mean"] == pytest.approx(expected, abs=1e-9)
    assert "difference" not in summary["nearest"]
    assert (folder / "comparison.png").is_file()


def test_methods_are_compared_on_the_same_draws(config, tmp_path, monkeypatch):
    """With calibrations that are made up, which take no time."""
    asked = []

    def calibrated(config, folder, loaded):
        assert loaded.pretrained.model is not None
        asked.append((config.rotation, config.seed, config.rounded, config.calibration_text))
        assert config.rounding.descent_passes == (0 if config.rotation == "none" else 2)
        row = {"perplexity": 2.0, "window_losses": [0.5 + config.seed, 0.25 * len(config.rotation)]}
        row |= {"seconds": {}, "bytes": 1}
        sections = {"precisions": {"W3A8": row}, "rounded": {"W3A8": row} if config.rounded else {}}
        settings = {"model": "m", "text": "t", "calibration_windows": 4, "seed": config.seed}
        baseline = {"perplexity": 1.5, "windows": 2}
        folder.mkdir()
        (folder / RESULT_NAME).write_text(json.dumps({"settings": settings, "baseline": baseline} | sections))

    monkeypatch.setattr(compare_methods.calibrate, "main", calibrated)
    config.calibration_text = "text.txt"
    with config.unlocked():
        config.methods.unrotated.rounding = {"descent_passes": 0}  # which changes no other method's
    compare_methods.main(config, tmp_path / "run")
    _check_comparison(tmp_path / "run")
    runs = [("full", 0, "W3A8"), ("none", 0, ""), ("full", 1, ""), ("none", 1, "")]
    assert asked == [(*run, "text.txt") for run in runs]


@pytest.mark.covered("the test above, and those of experiments/calibrate.py")
@pytest.mark.usefixtures("compiled_programs")
def test_calibrations_are_compared(config, tmp_path):
    compare_methods.main(config, tmp_path / "run")
    _check_comparison(tmp_path / "run")
    tokens = [np.load(tmp_path / "run" / f"tokens_{seed}.npy") for seed in "01"]
    assert (tokens[0] != tokens[1]).any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("against", "gptq", "config.against is 'gptq': choose from rounding, nearest, unrotated"),
        ("seeds", "0,one", "config.seeds is '0,one': give whole numbers"),
        ("compared", "rounding,quip", "config.compared names quip: choose from rounding"),
    ],
)
def test_wrong_settings_are_refused(config, tmp_path, field, value, message):
    config[field] = value
    with pytest.raises(ValueError, match=message):
        compare_methods.main(config, tmp_path / "run")
