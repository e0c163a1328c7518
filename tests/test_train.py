"""experiments/train.py on tiny models: it learns, goes on where it was stopped, and says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.nn import LinearGeneral
from configs import generate as generate_config
from configs import smollm2_w2a8_finetune, tiny_bf16, tiny_ternary_a8, tiny_w1a1, tiny_w2a2
from experiments import generate, train
from experiments.training_checkpoint import FOLDER
from experiments.training_log import METRICS_NAME, TrainingLog, read_metrics
from experiments.workdir import RESULT_NAME
from tests import tiny_checkpoints

STEPS = 16
TIMES = ("tokens_per_second",)
logits = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """Runs of the same config compile once: a run that goes on would spend its time on that."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in names.items():
            environment.setenv(name.upper(), str(value))  # for processes that tests start
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    chapters = (f"It was the best of times, it was the worst of times; chapter {i} begins.\n" for i in range(500))
    path.write_text("".join(chapters))
    return path


def shrink(config, text):
    """The real config, as small as a test wants it."""
    config.text, config.vocab_size, config.window_length, config.validation_every = str(text), 280, 16, 3
    if not config.pretrained:
        config.model.update({"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16})
        config.model.ffn_size = 48
    config.steps, config.batch_size, config.optimizer.warmup_steps = STEPS, 4, 2
    config.optimizer.learning_rate = 1e-2
    config.log_every, config.evaluate_every, config.evaluate_windows, config.evaluate_batch = 3, 8, 4, 4
    config.checkpoint_every, config.sample_tokens = 5, 0
    return config


def whole_config(text):
    """What most tests run: quantized, in bfloat16."""
    config = shrink(tiny_w2a2.get_config(), text)
    config.quantization.calibration = "absmax"
    return config


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """Folder of a whole run."""
    folder = tmp_path_factory.mktemp("run")
    train.main(whole_config(text), folder)
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """The same, for a test to damage."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def result_of(folder):
    return json.loads((folder / RESULT_NAME).read_text())


def losses(folder):
    """What must not depend on where a run was stopped."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(folder)]


def interrupt_at(monkeypatch, step):
    """The next run ends when it writes the metrics of that step."""
    original = TrainingLog.write

    def write(self, rows, prefix="train"):
        original(self, rows, prefix)
        if prefix == "train" and rows[-1]["step"] >= step:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLog, "write", write)


def test_it_learns_and_writes_down_what_it_did(run):
    rows, result = read_metrics(run), result_of(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[1]["learning_rate"] == pytest.approx(0.5e-2)
    assert rows[0]["perplexity"] == pytest.approx(np.exp(rows[0]["loss"]))
    assert [row["step"] for row in result["evaluations"]] == [8, STEPS]
    assert result["evaluations"][1]["loss"] < result["evaluations"][0]["loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (run / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
    assert b"validation/perplexity" in events.read_bytes()


def test_the_packed_model_scores_what_the_trained_one_did(run):
    result = result_of(run)
    assert result["packed"]["perplexity"] == result["evaluations"][-1]["perplexity"]


@pytest.mark.parametrize("learned_steps", [False, True])
def test_the_exported_model_gives_the_trained_logits_to_the_bit(text, tmp_path, monkeypatch, learned_steps):
    config = whole_config(text)
    config.steps, config.optimizer.warmup_steps, config.model.tie_embeddings = 3, 1, False
    config.rules = (("ffn/down", "W3A16"), ("^layers/", "W2A4g16"), ("lm_head", "W4A8"))
    config.quantization.learned_steps, config.quantization.calibration = learned_steps, "minmax"
    trained = []
    original = train.pack
    monkeypatch.setattr(train, "pack", lambda model: trained.append(model) or original(model))
    train.main(config, tmp_path)
    loaded = load_pretrained(tmp_path / train.MODEL_NAME)
    assert type(loaded.model.layers.attention.q_proj) is type(loaded.model.lm_head) is LinearGeneral
    ids = np.asarray([loaded.tokenizer.encode("It was the best of times").ids], np.int32)
    expected = logits(trained[0], ids)
    packed = loaded.model.layers.ffn.up_proj.kernel.get_value()
    dot_general = trained[0].layers.ffn.up_proj.dot_general
    kernel = trained[0].layers.ffn.up_proj.kernel[...]
    again = (
        dot_general.dot_general.pack(kernel, dot_general.step_size[...]) if learned_steps else dot_general.pack(kernel)
    )
    np.testing.assert_array_equal(packed.planes, again.planes)
    np.testing.assert_array_equal(logits(loaded.model, ids), expected)


def test_generate_runs_the_exported_model(run, tmp_path):
    config = generate_config.get_config()
    config.model, config.prompt, config.max_new_tokens = str(run / train.MODEL_NAME), "It was", 4
    generate.main(config, tmp_path)
    assert len(result_of(tmp_path)["tokens"]) == 4


def test_a_killed_run_goes_on_with_the_same_losses(run, text, tmp_path):
    """SIGKILL while metrics are written, at a step that is another one in every session of tests."""
    at = random.randint(6, STEPS - 1)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from experiments import train\n"
        "from experiments.training_log import TrainingLog\n"
        "from tests.test_train import whole_config\n"
        "original = TrainingLog.write\n"
        "def write(self, rows, prefix='train'):\n"
        "    original(self, rows, prefix)\n"
        f"    if prefix == 'train' and rows[-1]['step'] >= {at}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "TrainingLog.write = write\n"
        "train.main(whole_config(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(text), str(tmp_path)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert at <= len(read_metrics(tmp_path)) < STEPS or at > STEPS - 3
    assert losses(tmp_path) == losses(run)[: len(read_metrics(tmp_path))]
    train.main(whole_config(text), tmp_path)
    assert losses(tmp_path) == losses(run), f"killed at step {at}"
    assert result_of(tmp_path)["packed"] == result_of(run)["packed"]
    assert result_of(tmp_path)["evaluations"] == result_of(run)["evaluations"]


@pytest.mark.parametrize("kind", ["bit schedule", "distilled, learned steps, random gradients"])
def test_an_interrupted_run_goes_on_with_the_same_losses(text, tmp_path, monkeypatch, kind):
    if kind == "bit schedule":
        config = whole_config(text)
        config.rules, config.evaluate_every = (("^layers/", "0:float,4:W4A8,11:W1.58A8"),), STEPS
    else:
        model = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), tmp_path / "model")
        config = shrink(smollm2_w2a8_finetune.get_config(), text)
        config.pretrained = config.distillation.teacher = str(model)
        config.rules, config.quantization.gradient_bits = (("^layers/", "W2A8g16"),), 8
    train.main(config, tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1]["loss"] < losses(tmp_path / "whole")[0]["loss"]
    with monkeypatch.context() as context:
        interrupt_at(context, 12)
        with pytest.raises(KeyboardInterrupt):
            train.main(config, tmp_path / "stopped")
    train.main(config, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(copied, text):
    before = losses(copied)
    train.main(whole_config(text), copied)
    assert losses(copied) == before


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    config = whole_config(text)
    config.rules, config.optimizer.learning_rate, config.optimizer.warmup_steps = (), 1e38, 7
    config.checkpoint_every = 1
    with pytest.raises(
        RuntimeError, match=r"of step \d+ is (nan|inf): training stopped, .*; lower optimizer"
    ) as caught:
        train.main(config, tmp_path)
    bad = int(str(caught.value).split(" of step ")[1].split()[0])
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, bad))
    assert f"last good checkpoint is that of step {bad - 1};" in str(caught.value)
    assert str(bad - 1) in {path.name for path in (tmp_path / FOLDER).iterdir()}


@pytest.mark.parametrize("what", ["a flipped bit", "truncated", "no facts", "facts of another form"])
def test_a_damaged_checkpoint_is_named_and_kept(copied, text, what):
    checkpoint = copied / FOLDER / str(STEPS)
    arrays = max((path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    if what == "a flipped bit":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)
    elif what == "truncated":
        arrays.write_bytes(arrays.read_bytes()[:100])
    elif what == "no facts":
        shutil.rmtree(checkpoint / "about")
    else:
        (checkpoint / "about" / "metadata").write_text('{"settings": 1}')
    with pytest.raises(ValueError, match=f"{STEPS} is damaged or no checkpoint .* to go on from step 15"):
        train.main(whole_config(text), copied)
    assert arrays.is_file()
    assert len(losses(copied)) == STEPS


def test_after_moving_a_damaged_checkpoint_the_run_goes_on(copied, run, text):
    (copied / FOLDER / str(STEPS)).rename(copied / "damaged")
    train.main(whole_config(text), copied)
    assert losses(copied) == losses(run)


def test_checkpoints_of_another_run_are_refused(copied, text):
    config = whole_config(text)
    config.optimizer.learning_rate = 5e-3
    with pytest.raises(ValueError, match="was measured with other settings .*'learning_rate': 0.01"):
        train.main(config, copied)
    (copied / RESULT_NAME).unlink()
    with pytest.raises(ValueError, match="16 is of a run with other settings .*'learning_rate': 0.01"):
        train.main(config, copied)
    assert len(losses(copied)) == STEPS


def test_another_vocabulary_is_refused(run, text, tmp_path):
    model = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), tmp_path / "model")
    config = whole_config(text)
    config.distillation.teacher = str(model)
    with pytest.raises(ValueError, match="the teacher .* has another vocabulary"):
        train.main(config, tmp_path / "run")
    np.save(tmp_path / "ids.npy", np.arange(2000) % 300)
    config = whole_config(tmp_path / "ids.npy")
    with pytest.raises(ValueError, match="holds token ids: name the tokenizer.json"):
        train.main(config, tmp_path / "run")
    (config.tokenizer,) = map(str, run.glob("tokenizer-*.json"))
    with pytest.raises(ValueError, match=r"token ids span 0..299, outside the vocabulary 0..279"):
        train.main(config, tmp_path / "run")
    config = whole_config(text)
    config.pretrained, config.vocab_size = str(model), 500
    config.tokenizer = str(tmp_path / "large.json")
    train.load_training_data(whole_config(text), tmp_path).tokenizer.save(config.tokenizer)
    large = json.loads(Path(config.tokenizer).read_text())
    large["model"]["vocab"] |= {f"<{i}>": 280 + i for i in range(200)}
    Path(config.tokenizer).write_text(json.dumps(large))
    with pytest.raises(ValueError, match="the tokenizer has 480 tokens, the model's vocabulary 3[0-9]*: use the tok"):
        train.main(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float16", "dtype 'float16' is unknown"),
        ("rules", (("^layers/", "W9A8"),), "bits must be from 1 to 8, got 9"),
        ("rules", (("^layer$", "W2A8"),), "matches no layer; the nearest paths"),
        ("rules", (("^layers/", "W2A8g4096"),), "group_size must"),
        ("rules", (("^layers/", "soon:W2A8"),), "not of the form 1000:W4A8"),
        ("rules", (("^layers/", "5:W2A8"),), "stages must begin at step 0"),
        ("model.context_length", 8, "exceeds the model's context of 8"),
        ("batch_size", 10**6, "batch_size=1000000 must be from 1 to the"),
        ("vocab_size", 100, "vocab_size=100 must be above 256"),
        ("validation_every", 100, "no window of 16 tokens for validation"),
        ("steps", 0, "steps must be at least 1"),
        ("text", "/nowhere.txt", "no text at /nowhere.txt"),
        ("tokenizer", "/nowhere.json", "no tokenizer at /nowhere.json"),
    ],
)
def test_impossible_configs_are_one_sentence(text, tmp_path, field, value, message):
    config = whole_config(text)
    config.update_from_flattened_dict({field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main(config, tmp_path)
    assert not (tmp_path / METRICS_NAME).exists()


def test_packed_models_are_not_trained_further(run, text, tmp_path):
    config = whole_config(text)
    config.pretrained = str(run / train.MODEL_NAME)
    with pytest.raises(ValueError, match="has packed layers .*: training starts from a float model"):
        train.main(config, tmp_path)


@pytest.mark.parametrize("module", [tiny_w1a1, tiny_ternary_a8, tiny_bf16], ids=lambda module: module.__name__)
def test_each_config_takes_its_first_steps(module, text, tmp_path):
    config = shrink(module.get_config(), text)
    config.steps, config.optimizer.warmup_steps = 2, 1
    train.main(config, tmp_path)
    assert result_of(tmp_path)["packed"]["loss"] == result_of(tmp_path)["evaluations"][-1]["loss"]


def test_an_unknown_config_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--config=configs/tiny_w0a0.py", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "tiny_w0a0.py" in done.stderr.strip().splitlines()[-1]
