"""experiments/distill.py on a tiny model: what it writes, resuming to the same numbers, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.compress.distillation import Schedule
from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.loaders import load_pretrained
from configs import distill as distill_config
from experiments import distill
from experiments.support import workdir
from experiments.support.timing import Compilations
from experiments.training import distillation_run
from experiments.training.distillation_run import DistillationRun, batch_of, fitted, schedule_of
from tests.support import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("compiled_programs")
STEPS = 6
NAMES = ("W3A8g32", "W2A8g32")


def save_packed(pretrained, rotated, folder, name):
    """Writes the model at one precision."""
    packed = bj.quantize_model(rotated, [("^(embed|lm_head)$", "W8A16"), ("^layers/", name)])
    bj.models.save_model(folder / f"{name}.safetensors", pretrained.with_model(packed))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny model, rotated and packed as experiments/calibrate would, and a config to distil it."""
    folder = tmp_path_factory.mktemp("models")
    source = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), folder / "float")
    pretrained = load_pretrained(source)
    rotated = bj.compress.rotate(pretrained.model, key=jax.random.key(3), block=4)
    save_packed(pretrained, rotated, folder, NAMES[0])
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    config = distill_config.get_config()
    config.model, config.text = str(source), str(folder / "text.txt")
    config.packed = str(folder / f"{NAMES[0]}.safetensors")
    config.rotation_seed, config.windows, config.window_length, config.sample_tokens = 3, 3, 16, 0
    config.distillation_windows, config.distillation_length, config.windows_per_step = 10, 12, 5
    config.steps, config.batch_size, config.warmup_steps, config.learning_rate = STEPS, 4, 2, 1e-2
    config.log_every, config.checkpoint_every = 1, 2
    return config


@pytest.fixture(scope="module")
def both(config):
    """A config to distil the model at two precisions."""
    config, folder = config.copy_and_resolve_references(), Path(config.packed).parent
    pretrained = load_pretrained(config.model)
    save_packed(pretrained, bj.compress.rotate(pretrained.model, key=jax.random.key(3), block=4), folder, NAMES[1])
    config.packed += f",{folder / NAMES[1]}.safetensors"
    return config


@pytest.fixture(scope="module")
def run(both, compiled_programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    distill.main(both, folder)
    return folder


def read(folder):
    return json.loads((folder / workdir.RESULT_NAME).read_text())


@pytest.mark.covered("learning, by compress/distillation; rows, by test_calibrate.py; the loop, by test_train.py")
def test_the_result_has_all_models_and_the_losses(run, both):
    config = both
    result = read(run)
    ids = load_pretrained(config.model).tokenizer.encode(open_text(config), add_special_tokens=False).ids
    rows = {"baseline": config.model} | {name: path for name, path in zip(NAMES, config.packed.split(","), strict=True)}
    for name, path in rows.items():
        scored = perplexity(load_pretrained(path).model, ids, windows=3, window_length=16)
        before = result[name] if name == "baseline" else result["calibrated"][name]
        assert before["perplexity"] == scored.perplexity
    for name in NAMES:
        packed, about = load_pretrained(run / f"{name}.safetensors"), result["distillation"][name]
        assert str(packed.model.layers.attention.q_proj.precision) == name
        scored = perplexity(packed.model, ids, windows=3, window_length=16)
        assert result["precisions"][name]["perplexity"] == scored.perplexity
        assert scored.perplexity != result["calibrated"][name]["perplexity"]
        assert [row["step"] for row in about["log"]] == list(range(1, STEPS + 1))
        assert about["schedule"]["steps"] == STEPS
        assert about["milliseconds"] > 0
        assert set(about["seconds"]) == {"prepare", "train"}
        assert not (run / f"{name}.training").exists()
    assert (run / "perplexity.png").is_file()


def open_text(config):
    with open(config.text) as file:
        return file.read()


@pytest.mark.covered("checkpoints and resuming, by test_train_resume.py, which shares them")
def test_a_stopped_run_resumes_to_the_same_model(run, both, tmp_path, monkeypatch):
    original, calls = DistillationRun._flush, []

    def killed(self, *arguments):
        original(self, *arguments)
        calls.append(self.done)
        if len(calls) == STEPS + 3:  # of the second model, after the checkpoint of step 2
            raise MemoryError

    monkeypatch.setattr(DistillationRun, "_flush", killed)
    with pytest.raises(MemoryError):
        distill.main(both, tmp_path)
    monkeypatch.undo()
    distill.main(both, tmp_path)
    for name in NAMES:
        logs = [read(folder)["distillation"][name]["log"] for folder in (tmp_path, run)]
        assert logs[0] == logs[1]
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (run / f"{name}.safetensors").read_bytes()
    monkeypatch.setattr(distill, "learning_model", None)
    distill.main(both, tmp_path)  # finished: nothing is trained again


@pytest.mark.covered("a step on a mesh, by tests/compress/distillation")
def test_two_devices_distil_as_one_does(run, config, tmp_path):
    config = config.copy_and_resolve_references()
    config.mesh.data = 2
    distill.main(config, tmp_path)
    one, other = ([row["loss"] for row in read(folder)["distillation"][NAMES[0]]["log"]] for folder in (run, tmp_path))
    np.testing.assert_allclose(one, other, rtol=1e-3)


@pytest.mark.covered("fitted schedules, below")
def test_steps_are_fitted_to_the_time_and_their_programs_compile_once(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.seconds, config.checkpoint_every = 1000.0, 600
    monkeypatch.setattr(distill, "_SECONDS_OF_SCORE", 0.0)
    monkeypatch.setattr(distill, "seconds_of_step", lambda *_: 250.0)
    compiled = []
    original = distill.DistillationRun.train

    def train(self, interrupt):
        start = len(listener.seconds)
        original(self, interrupt)
        compiled.append(len(listener.seconds) - start)

    listener = Compilations.listen()
    monkeypatch.setattr(distill.DistillationRun, "train", train)
    distill.main(config, tmp_path)
    about = read(tmp_path)["distillation"][NAMES[0]]
    assert about["schedule"]["steps"] == len(about["log"]) == 3
    assert about["schedule"]["warmup"] == 0
    assert about["settings"]["steps"] == STEPS
    assert compiled == [0]


def test_schedules_are_fitted_to_a_time():
    schedule = Schedule(steps=600, learning_rate=2e-5)
    assert fitted(schedule, 0.06, 100) == schedule
    assert fitted(schedule, 0.06, 18.1) == dataclasses.replace(schedule, steps=301, warmup=30)
    with pytest.raises(RuntimeError, match=r"0\.0 seconds are left, a step takes 0\.06: give more --config\.seconds"):
        fitted(schedule, 0.06, -3)


def test_a_config_has_the_schedule_of_each_precision_unless_it_names_one():
    config, precision = distill_config.get_config(), bj.Precision.parse("W3A8g64")
    assert schedule_of(config, precision) == Schedule(steps=1200, learning_rate=1e-4)
    config.steps, config.scale_rate = 80, 0.2
    assert schedule_of(config, precision) == Schedule(steps=80, learning_rate=1e-4, warmup=8, scale_rate=0.2)


def test_more_steps_than_those_of_a_precision_are_used_where_time_allows():
    config, precision = distill_config.get_config(), bj.Precision.parse("W4A8g64")
    config.steps_factor = 4.0
    schedule = schedule_of(config, precision)
    assert schedule == Schedule(steps=3600, learning_rate=2e-5)
    assert schedule.rate(1800) == pytest.approx(1e-5)  # cosine decay, half-way through all steps
    assert fitted(schedule, 0.06, 60).steps == 1000


@pytest.mark.covered("Ctrl-C, by test_train_resume.py")
def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint(config, tmp_path, monkeypatch):
    class Pressed:
        requested = True
        deferred = staticmethod(distill.Interrupt().deferred)

    original = DistillationRun.train
    monkeypatch.setattr(DistillationRun, "train", lambda self, _: original(self, Pressed()))
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 1"):
        distill.main(config, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 2"):
        distill.main(config, tmp_path)


def test_batches_pass_over_all_windows_in_another_order_each_time():
    windows = np.arange(22).reshape(11, 2)
    first, second = ([batch_of(windows, step + start, 4, seed=0) for step in range(2)] for start in (0, 2))
    for batches in (first, second):
        assert len({int(window[0]) for batch in batches for window in batch}) == 8
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(batch_of(windows, 3, 4, seed=0), second[1])
    assert not np.array_equal(batch_of(windows, 0, 4, seed=1), first[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": ""}, "config.packed is missing"),
        ({"seconds": -1.0}, "seconds must be at least 0"),
        ({"steps_factor": 0.0}, "steps_factor must be positive and finite, got 0.0"),
        ({"steps_factor": 4.0}, r"steps_factor=4.0 multiplies .*, steps=6 replaces them: give one"),
        ({"warmup_steps": -1}, "warmup=-1 must be at least 0 and below steps=6"),
        ({"rotation_seed": 4}, "rotated otherwise than by rotation_seed=4"),
        ({"batch_size": 11}, "a batch takes 11 windows, there are 10"),
        ({"parts": 3}, "parts=3 times the 1 devices of config.mesh must divide batch_size=4"),
        ({"mesh": {"data": 2}, "parts": 4}, "parts=4 times the 2 devices of config.mesh must divide batch_size=4"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"packed": "twice"}, "give one checkpoint of each precision"),
    ],
)
def test_impossible_configs_are_refused(config, tmp_path, changes, message):
    packed, config = config.packed, config.copy_and_resolve_references()
    config.update(changes)
    if config.packed == "twice":
        config.packed = f"{packed},{packed}"
    with pytest.raises(ValueError, match=message):
        distill.main(config, tmp_path)


@pytest.mark.covered("the check, by test_train_resume.py")
def test_losses_that_are_not_finite_end_a_run(config, tmp_path, monkeypatch):
    nan = {"loss": np.float32("nan"), "gradient_norm": np.float32(1)}
    monkeypatch.setattr(distillation_run.Step, "__call__", lambda self, state, *_: (state, nan))
    with pytest.raises(RuntimeError, match="the loss of step 1 is nan: lower learning_rate"):
        distill.main(config, tmp_path)


def test_windows_of_other_tokens_are_refused(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.distillation_text = str(tmp_path / "windows.npy")
    teacher = load_pretrained(config.model).model
    for windows, message in (
        (np.full((10, 12), 10**6), "outside the vocabulary"),
        (np.ones((10, 12)), "be a sequence"),
        (np.ones((9, 12), np.int32), r"has the shape \(9, 12\), asked for are 10 windows of 12"),
    ):
        for name in (config.distillation_text, tmp_path / distill.WINDOWS_NAME):
            np.save(name, windows)
        for config.distillation_text in (str(tmp_path / "windows.npy"), "self"):
            with pytest.raises(ValueError, match=message):
                distill._windows(config, tmp_path, teacher)
        config.distillation_text = str(tmp_path / "windows.npy")
