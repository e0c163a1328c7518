"""experiments/quantize.py and generate.py on a tiny model: results, resuming, errors."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.loaders import load_pretrained
from configs import generate as generate_config
from configs import smollm2 as quantize_config
from experiments import generate, quantize
from experiments.support import precision_sweep, workdir
from tests.support import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("compiled_programs")
WINDOWS, LENGTH = 3, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model in a Hugging Face directory."""
    return tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    return path


def tiny_config(model, text, precisions="W8A8,W2A8g32", sample_tokens=0):
    config = quantize_config.get_config()
    config.model, config.text, config.precisions = str(model), str(text), precisions
    config.windows, config.window_length, config.sample_tokens = WINDOWS, LENGTH, sample_tokens
    return config


@pytest.fixture(scope="module")
def run(model, text, compiled_programs, tmp_path_factory):
    """Workdir of one complete run, of one precision: samples take many programs."""
    folder = tmp_path_factory.mktemp("run")
    quantize.main(tiny_config(model, text, "W2A8g32", sample_tokens=3), folder)
    return folder


@pytest.fixture(scope="module")
def resumed(model, text, compiled_programs, tmp_path_factory):
    """Workdir of a run that was killed in the first precision, and resumed twice; what the last time measured."""
    folder, measured = tmp_path_factory.mktemp("resumed"), []
    original = precision_sweep.measure

    def killed(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(precision_sweep, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize.main(tiny_config(model, text), folder)
        assert read(folder)["precisions"] == {}
        monkeypatch.undo()
        quantize.main(tiny_config(model, text, "W8A8"), folder)
        monkeypatch.setattr(
            precision_sweep, "measure", lambda name, *args: measured.append(name) or original(name, *args)
        )
        quantize.main(tiny_config(model, text), folder)
    return folder, measured


def read(folder):
    return json.loads((folder / workdir.RESULT_NAME).read_text())


def test_the_result_describes_text_and_models(run, model, text):
    result = read(run)
    ids = load_pretrained(model).tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    used = np.array(ids[: WINDOWS * LENGTH], "<i4")
    assert result["baseline"]["tokens"] == WINDOWS * (LENGTH - 1)
    assert result["baseline"]["text_tokens"] == len(ids)
    assert result["baseline"]["ids_sha256"] == hashlib.sha256(used.tobytes()).hexdigest()
    assert list(result["precisions"]) == ["W2A8g32"]
    for row in (result["baseline"], *result["precisions"].values()):
        assert math.isfinite(row["perplexity"])
        assert row["standard_error"] > 0
        assert row["windows"] == WINDOWS
        assert isinstance(row["sample"], str)
        assert min(row["sample_margins"]) >= 0
        assert len(row["sample_margins"]) <= 3


def test_fewer_bits_take_fewer_bytes(resumed):
    folder, _ = resumed
    result = read(folder)
    assert list(result["precisions"]) == ["W8A8", "W2A8g32"]
    sizes = [result["baseline"]["bytes"], *(result["precisions"][name]["bytes"] for name in ("W8A8", "W2A8g32"))]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_plot_is_a_png(run):
    assert (run / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["W8A8", "W2A8g32"])
@pytest.mark.sample(1)
def test_checkpoints_give_the_reported_perplexity(resumed, text, name):
    folder, _ = resumed
    packed = load_pretrained(folder / f"{name}.safetensors")
    ids = packed.tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    again = perplexity(packed.model, ids, windows=WINDOWS, window_length=LENGTH)
    assert again.perplexity == read(folder)["precisions"][name]["perplexity"]


def test_a_stopped_run_measures_what_it_lacks(resumed):
    _, measured = resumed
    assert measured == ["W2A8g32"]


def test_results_with_other_settings_are_kept_and_named(run, model, text):
    before = read(run)
    config = tiny_config(model, text, "W2A8g32")
    config.windows, config.calibration = WINDOWS - 1, "mse"
    with pytest.raises(ValueError, match="calibration: stored '', now 'mse'; windows: stored 3, now 2"):
        quantize.main(config, run)
    assert read(run) == before


def test_a_missing_checkpoint_is_written_again(model, text, tmp_path):
    config = tiny_config(model, text, "W8A8")
    config.checkpoints = False
    quantize.main(config, tmp_path)
    assert not (tmp_path / "W8A8.safetensors").exists()
    quantize.main(tiny_config(model, text, "W8A8"), tmp_path)
    assert read(tmp_path)["precisions"]["W8A8"]["checkpoint_bytes"] == (tmp_path / "W8A8.safetensors").stat().st_size


def test_a_checkpoint_with_a_flipped_bit_is_written_again(model, text, tmp_path):
    quantize.main(tiny_config(model, text, "W8A8"), tmp_path)
    path = tmp_path / "W8A8.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    quantize.main(tiny_config(model, text, "W8A8"), tmp_path)
    assert path.read_bytes() == raw


def test_impossible_precisions_are_rejected_before_measuring(model, text, tmp_path):
    with pytest.raises(ValueError, match="cannot quantize layer .* to W4A8g4096: group_size must be"):
        quantize.main(tiny_config(model, text, "W8A8,W4A8g4096"), tmp_path)
    assert not (tmp_path / workdir.RESULT_NAME).exists()


def test_a_packed_model_is_rejected(run, text, tmp_path):
    with pytest.raises(ValueError, match="packed layers are not packed again"):
        quantize.main(tiny_config(run / "W2A8g32.safetensors", text, "W4A8"), tmp_path)


def test_generate_prints_the_text_of_its_result(run, tmp_path, capsys):
    config = generate_config.get_config()
    config.model, config.prompt, config.max_new_tokens = str(run / "W2A8g32.safetensors"), "It was", 4
    generate.main(config, tmp_path)
    result = read(tmp_path)
    packed = load_pretrained(run / "W2A8g32.safetensors")
    prompt = packed.tokenizer.encode("It was").ids
    whole = packed.tokenizer.decode(prompt + result["tokens"])
    assert 1 <= len(result["tokens"]) <= 4
    assert whole.startswith("It was" + result["text"])
    assert result["text"] in capsys.readouterr().out


def command(module, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, flags)], capture_output=True, text=True, check=False
    )


@pytest.mark.covered("support/test_app.py")
def test_command_line_overrides_the_config(model, text, tmp_path):
    done = command(
        "quantize",
        "--config=configs/smollm2.py",
        f"--workdir={tmp_path}",
        f"--config.model={model}",
        f"--config.text={text}",
        "--config.windows=2",
        "--config.window_length=8",
        "--config.sample_tokens=0",
        "--config.precisions=W3A4",
    )
    assert done.returncode == 0, done.stderr
    assert "W3A4" in done.stdout
    assert list(read(tmp_path)["precisions"]) == ["W3A4"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.precisions=W9A8", "bits must be from 1 to 8, got 9"),
        ("--config.precisions=int4", "precision 'int4' is not of the form W4A8 or W4A8g64"),
        ("--config.text=/nowhere/text.txt", "no text at /nowhere/text.txt"),
        ("--config.model=/nowhere/model.gguf", "no checkpoint at /nowhere/model.gguf"),
    ],
)
@pytest.mark.sample(1)
def test_bad_input_is_reported_in_one_line(text, tmp_path, flag, message):
    done = command("quantize", "--config=configs/smollm2.py", f"--workdir={tmp_path}", f"--config.text={text}", flag)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_too_short_a_text_names_the_number_of_windows(model, text, tmp_path):
    config = tiny_config(model, text)
    config.windows = 10**6
    with pytest.raises(ValueError, match="ask for at most"):
        quantize.main(config, tmp_path)
