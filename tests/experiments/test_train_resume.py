"""A stopped run of experiments/train.py resumes with identical losses, or says why it cannot."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs import smollm2_w2a8_finetune
from experiments import train
from experiments.support.workdir import RESULT_NAME
from experiments.training.checkpoint import FOLDER
from experiments.training.interrupt import Interrupt
from experiments.training.log import TrainingLog, read_metrics
from tests.support import tiny_checkpoints
from tests.support.optimizations import optimizations
from tests.support.tiny_training import STEPS, losses, result_of, shrink, whole_config, without_evaluation


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled_programs(compiled_programs):
    """Compared runs use the same compiled programs, in this process and in subprocesses."""
    with optimizations(False), pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A copy of a complete run, for a test to damage."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def interrupt_at(monkeypatch, step):
    """Makes the next run end when it writes the metrics of that step."""
    original = TrainingLog.write

    def write(self, rows, prefix="train"):
        original(self, rows, prefix)
        if prefix == "train" and rows[-1]["step"] >= step:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLog, "write", write)


def test_a_killed_run_resumes_with_the_same_losses(tiny_run, tiny_text, tmp_path):
    """SIGKILL while metrics are written, at a random step."""
    at = random.randint(6, STEPS - 1)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from experiments import train\n"
        "from experiments.training.log import TrainingLog\n"
        "from tests.support.tiny_training import whole_config\n"
        "original = TrainingLog.write\n"
        "def write(self, rows, prefix='train'):\n"
        "    original(self, rows, prefix)\n"
        f"    if prefix == 'train' and rows[-1]['step'] >= {at}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "TrainingLog.write = write\n"
        "train.main(whole_config(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tiny_text), str(tmp_path)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert at <= len(read_metrics(tmp_path)) < STEPS or at > STEPS - 3
    assert losses(tmp_path) == losses(tiny_run)[: len(read_metrics(tmp_path))]
    train.main(whole_config(tiny_text), tmp_path)
    assert losses(tmp_path) == losses(tiny_run), f"killed at step {at}"
    assert result_of(tmp_path)["packed"] == result_of(tiny_run)["packed"]
    assert result_of(tmp_path)["evaluations"] == result_of(tiny_run)["evaluations"]


@pytest.mark.parametrize("kind", ["bit schedule", "distilled, learned steps, random gradients"])
@pytest.mark.covered("resuming, by test_a_killed_run_resumes_with_the_same_losses; Ctrl-C, by a test below")
def test_an_interrupted_run_resumes_with_the_same_losses(tiny_text, tmp_path, monkeypatch, kind):
    without_evaluation(monkeypatch)
    if kind == "bit schedule":
        config = whole_config(tiny_text)
        config.rules = (("^layers/", "0:float,4:W4A8,11:W1.58A8"),)
    else:
        model = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), tmp_path / "model")
        config = shrink(smollm2_w2a8_finetune.get_config(), tiny_text)
        config.pretrained = config.distillation.teacher = str(model)
        config.rules, config.quantization.gradient_bits = (("^layers/", "W2A8g16f"),), 8
        config.dtype = "float32"  # teacher and student start with the same arrays
    train.main(config, tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1]["loss"] < losses(tmp_path / "whole")[0]["loss"]
    with monkeypatch.context() as context:
        interrupt_at(context, 12)
        with pytest.raises(KeyboardInterrupt):
            train.main(config, tmp_path / "stopped")
    train.main(config, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(copied, tiny_text):
    before = losses(copied)
    train.main(whole_config(tiny_text), copied)
    assert losses(copied) == before


def test_a_nonfinite_loss_stops_the_run(tiny_text, tmp_path):
    config = whole_config(tiny_text)
    config.rules, config.optimizer.learning_rate, config.optimizer.warmup_steps = (), 1e38, 7
    config.checkpoint_every = 1
    with pytest.raises(
        RuntimeError, match=r"of step \d+ is (nan|inf): training stopped, .*; lower optimizer"
    ) as caught:
        train.main(config, tmp_path)
    bad = int(str(caught.value).split(" of step ")[1].split()[0])
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, bad))
    assert f"last good checkpoint is of step {bad - 1};" in str(caught.value)
    assert str(bad - 1) in {path.name for path in (tmp_path / FOLDER).iterdir()}


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "no metadata", "metadata of another form"])
def test_a_damaged_checkpoint_is_named_and_kept(copied, tiny_text, damage):
    checkpoint = copied / FOLDER / str(STEPS)
    arrays = max((path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    if damage == "a flipped bit":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)
    elif damage == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:100])
    elif damage == "no metadata":
        shutil.rmtree(checkpoint / "about")
    else:
        (checkpoint / "about" / "metadata").write_text('{"settings": 1}')
    with pytest.raises(ValueError, match=f"{STEPS} is damaged or not a checkpoint .* to resume from step 15"):
        train.main(whole_config(tiny_text), copied)
    gc.collect()  # reads that Orbax abandoned must not warn in other tests
    assert arrays.is_file()
    assert len(losses(copied)) == STEPS


def test_after_moving_a_damaged_checkpoint_the_run_resumes(copied, tiny_run, tiny_text):
    (copied / FOLDER / str(STEPS)).rename(copied / "damaged")
    train.main(whole_config(tiny_text), copied)
    assert losses(copied) == losses(tiny_run)


def test_checkpoints_of_another_run_are_rejected(copied, tiny_text):
    config = whole_config(tiny_text)
    config.optimizer.learning_rate = 5e-3
    with pytest.raises(ValueError, match="was measured with other settings .*'learning_rate': 0.01"):
        train.main(config, copied)
    (copied / RESULT_NAME).unlink()
    with pytest.raises(ValueError, match="16 belongs to a run with other settings .*'learning_rate': 0.01"):
        train.main(config, copied)
    assert len(losses(copied)) == STEPS


def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint(tiny_run, tiny_text, tmp_path, monkeypatch, capsys):
    original, sent = TrainingLog.write, []

    def write(self, rows, prefix="train"):
        if rows[-1]["step"] == 6 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step's bookkeeping
        original(self, rows, prefix)

    monkeypatch.setattr(TrainingLog, "write", write)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 6: the same command resumes there"):
        train.main(whole_config(tiny_text), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"5", "6"}
    train.main(whole_config(tiny_text), tmp_path)
    assert losses(tmp_path) == losses(tiny_run)
    assert result_of(tmp_path)["packed"] == result_of(tiny_run)["packed"]


def test_ctrl_c_that_a_library_ignores_still_ends_the_run(tiny_text, tmp_path, monkeypatch):
    load = train.load_training_data

    def ignoring(*arguments):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return load(*arguments)

    monkeypatch.setattr(train, "load_training_data", ignoring)
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 0"):
        train.main(whole_config(tiny_text), tmp_path)
    assert not read_metrics(tmp_path)


def test_a_second_ctrl_c_stops_at_once():
    interrupt = Interrupt()
    with interrupt.watching(), interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
