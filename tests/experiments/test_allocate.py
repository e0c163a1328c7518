"""experiments/allocate.py on a tiny model: from precisions and a budget to rules, and to the model that they make."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bipolar_jax.models.loaders import load_pretrained
from configs import smollm2 as quantize_config
from experiments import allocate, quantize
from experiments.support import workdir
from experiments.support.config_files import load_config
from tests.support import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("compiled_programs")
LENGTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoints.write_huggingface(tiny_checkpoints.make(tied=True), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (4, LENGTH)))
    return path


def tiny_config(model, tokens):
    config = load_config("compression/allocate").config
    config.model, config.calibration_text, config.rotation = str(model), str(tokens), "none"
    config.calibration_windows, config.calibration_length, config.windows_per_step = 4, LENGTH, 4
    config.rounding.algorithm = "nearest"  # fewer programs to compile
    config.precisions, config.budget, config.sensitivity_windows, config.runs = "W2A8,W5A8", "W2A8", 4, 2
    return config


@pytest.fixture(scope="module")
def run(model, tokens, compiled_programs, tmp_path_factory):
    """Workdir of a run that was killed after it had measured a block, and resumed with another budget."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(model, tokens)
    original = allocate.write_json

    def killed(path, value):
        original(path, value)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(allocate, "write_json", killed)
        allocate.main(config, folder)
    first = json.loads((folder / workdir.RESULT_NAME).read_text())["losses"]
    assert list(first) == ["0"]
    bits = 3.6 + 64 / 48  # between both precisions
    config.budget = str(bits)
    allocate.main(config, folder)
    assert json.loads((folder / workdir.RESULT_NAME).read_text())["losses"]["0"] == first["0"]
    return folder, bits


@pytest.mark.covered("the choice and losses of sites, by compress/allocation")
def test_the_budget_is_spent_where_it_counts(run):
    folder, bits = run
    result = json.loads((folder / workdir.RESULT_NAME).read_text())
    found, uniform = result["assignments"][str(bits)], result["uniform"]
    for losses in result["losses"].values():
        assert (np.array(losses["W5A8"]) < np.array(losses["W2A8"])).all()  # more bits, less loss
    assert uniform["W2A8"]["cost"] < found["cost"] <= found["budget"] == bits
    assert uniform["W5A8"]["predicted_loss"] < found["predicted_loss"]
    assert found["predicted_loss"] < uniform["W2A8"]["predicted_loss"]
    assert len(found["runs"]) <= 2
    assert (folder / "pareto.png").is_file()


@pytest.mark.covered("rules from files, by test_calibrate.py")
def test_quantize_takes_the_rules(run, model, tokens, tmp_path):
    folder, bits = run
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    config = quantize_config.get_config()
    config.model, config.text, config.precisions, config.rules = (
        str(model),
        str(text),
        "",
        str(folder / f"rules_{bits}.json"),
    )
    config.windows, config.window_length, config.sample_tokens = 2, LENGTH, 0
    quantize.main(config, tmp_path / "run")
    assert list(json.loads((tmp_path / "run" / workdir.RESULT_NAME).read_text())["precisions"]) == ["rules"]
    packed = load_pretrained(tmp_path / "run" / "rules.safetensors").model
    result = json.loads((folder / workdir.RESULT_NAME).read_text())["assignments"][str(bits)]
    for layer, chosen in enumerate(result["choices"]):
        block = packed.block(layer)
        layers = block.attention.q_proj, block.attention.o_proj, block.ffn.up_proj, block.ffn.down_proj
        assert [str(each.precision) for each in layers] == chosen


@pytest.mark.covered("the choice, by the tests beside and compress/allocation; times of products, by bench/products")
def test_milliseconds_are_those_of_this_device_and_sites_may_be_alike(run, model, tokens):
    folder, _ = run
    config = tiny_config(model, tokens)
    config.unit, config.budget, config.alike = "milliseconds", "W5A8", True
    allocate.main(config, folder)
    result = json.loads((folder / workdir.RESULT_NAME).read_text())
    assert all(time > 0 for times in result["milliseconds"].values() for time in times)
    assert result["assignments"]["W5A8"]["cost"] <= result["uniform"]["W5A8"]["cost"] * (1 + 1e-6)
    assert all(len(set(chosen)) == 1 for chosen in result["assignments"]["W5A8"]["choices"])


@pytest.mark.covered("a mesh of eight, by distributed/test_programs_on_meshes.py")
def test_devices_divide_the_windows_that_losses_are_measured_with(run, model, tokens, tmp_path):
    folder, bits = run
    config = tiny_config(model, tokens)
    config.budget, config.mesh.model = str(bits), 2
    allocate.main(config, tmp_path)
    one, other = (json.loads((each / workdir.RESULT_NAME).read_text()) for each in (folder, tmp_path))
    for block, losses in one["losses"].items():
        for option, row in losses.items():
            np.testing.assert_allclose(other["losses"][block][option], row, rtol=1e-3)
    assert other["assignments"][str(bits)]["choices"] == one["assignments"][str(bits)]["choices"]
    assert (tmp_path / f"rules_{bits}.json").read_bytes() == (folder / f"rules_{bits}.json").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"unit": "milliseconds"},
            "those of one device, and config.mesh.data=1 times config.mesh.model=2 is 2: measure",
        ),
        (
            {"sensitivity_windows": 3},
            "sensitivity_windows=3, config.windows_per_step=4 at once, do not divide over the 2",
        ),
        ({"windows_per_step": 3}, "windows_per_step=3 at once, do not divide .*: make both multiples of 2"),
        ({"mesh": {"data": 3}}, "config.mesh.data=3 times config.mesh.model=2 is 6 devices, and there are 2"),
    ],
)
def test_meshes_that_do_not_measure_are_refused_before_anything_is_loaded(tmp_path, fields, message):
    config = tiny_config("no model", "no tokens")
    config.mesh.model = 2
    config.update(fields)
    with pytest.raises(ValueError, match=message):
        allocate.main(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("unit", "hours", "config.unit is 'hours': choose from bits, bytes, milliseconds"),
        ("budget", "much", "config.budget is 'much': give numbers of bits, or some of the precisions"),
        ("precisions", "W4A8", "name at least two different ones"),
        ("runs", 0, "config.runs must be at least 1"),
        ("only", "W3A8", "config.only is 'W3A8', which is none of W2A8, W5A8"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(tmp_path, field, value, message):
    config = tiny_config("no model", "no tokens")
    config[field] = value
    with pytest.raises(ValueError, match=message):
        allocate.main(config, tmp_path)
