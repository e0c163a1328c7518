"""experiments/train.py on tiny models: losses fall, the exported model equals the trained one, bad configs fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.nn import Linear
from configs import generate as generate_config
from configs import sample_text as sample_config
from configs import tiny_bf16, tiny_ternary_a8, tiny_w1a1, tiny_w2a2
from experiments import generate, sample_text, train
from experiments.training.log import METRICS_NAME, read_metrics
from experiments.training.step import make_optimizer
from tests.support import tiny_checkpoints
from tests.support.tiny_training import STEPS, result_of, shrink, whole_config, without_evaluation

pytestmark = pytest.mark.usefixtures("compiled_programs")
logits = jax.jit(lambda model, ids: model(ids))


def test_the_loss_falls_and_is_logged(tiny_run):
    rows, result = read_metrics(tiny_run), result_of(tiny_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[1]["learning_rate"] == pytest.approx(0.5e-2)
    assert rows[0]["perplexity"] == pytest.approx(np.exp(rows[0]["loss"]))
    assert [row["step"] for row in result["evaluations"]] == [0, 8, STEPS]
    assert result["evaluations"][1]["loss"] < result["evaluations"][0]["loss"]
    assert (tiny_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (tiny_run / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
    assert b"validation/perplexity" in events.read_bytes()


def test_the_packed_model_scores_as_the_trained_one(tiny_run):
    result = result_of(tiny_run)
    assert result["packed"]["perplexity"] == result["evaluations"][-1]["perplexity"]


@pytest.mark.parametrize("learned_steps", [False, True])
@pytest.mark.covered("nn/test_training_conversion.py")
def test_the_exported_model_has_the_trained_logits_bit_for_bit(tiny_text, tmp_path, monkeypatch, learned_steps):
    config = whole_config(tiny_text)
    config.steps, config.optimizer.warmup_steps, config.model.tie_embeddings = 3, 1, False
    config.rules = (("ffn/down", "W3A16"), ("^layers/", "W2A4g16"), ("lm_head", "W4A8"))
    config.quantization.learned_steps, config.quantization.calibration = learned_steps, "minmax"
    config.rules = config.rules[1:] if learned_steps else config.rules  # clipping is for quantized activations
    config.quantization.clip_activations = 2.0 if learned_steps else 0.0
    without_evaluation(monkeypatch)
    trained = []
    original = train.pack
    monkeypatch.setattr(train, "pack", lambda model: trained.append(model) or original(model))
    train.main(config, tmp_path)
    loaded = load_pretrained(tmp_path / train.MODEL_NAME)
    assert type(loaded.model.layers.attention.q_proj) is type(loaded.model.lm_head) is Linear
    assert str(loaded.model.lm_head.trained.precision) == "W4A8"
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


def test_step_sizes_have_their_own_rate():
    config = tiny_w2a2.get_config()
    config.optimizer.warmup_steps, config.optimizer.weight_decay, config.optimizer.step_size_rate = 0, 0.0, 0.25
    params = {
        "layers/q_proj/kernel": np.ones((2, 2), np.float32),
        "layers/q_proj/dot_general/step_size": np.ones(2, np.float32),
    }
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    kernel, step_size = (np.asarray(updates[name]) for name in params)
    np.testing.assert_allclose(kernel, -config.optimizer.learning_rate, rtol=1e-5)
    np.testing.assert_allclose(step_size, -0.25 * config.optimizer.learning_rate, rtol=1e-5)


def test_the_exported_model_is_read_at_fewer_bits(tiny_run):
    loaded = load_pretrained(tiny_run / train.MODEL_NAME, bits=1)
    assert loaded.model.layers.attention.q_proj.kernel.get_value().bits == 1
    assert np.isfinite(logits(loaded.model, np.arange(6)[None])).all()


@pytest.mark.covered("exported models, by the tests beside; generating, by test_quantize_and_generate.py")
def test_generate_runs_the_exported_model(tiny_run, tmp_path):
    config = generate_config.get_config()
    config.model, config.prompt, config.max_new_tokens = str(tiny_run / train.MODEL_NAME), "It was", 4
    generate.main(config, tmp_path)
    assert len(result_of(tmp_path)["tokens"]) == 4


def test_a_model_trains_on_text_sampled_from_another(tiny_run, tiny_text, tmp_path):
    config = sample_config.get_config()
    config.model, config.texts, config.batch_size, config.length = str(tiny_run / train.MODEL_NAME), 6, 4, 12
    config.prefix = "It"
    sample_text.main(config, tmp_path)
    written = tmp_path / sample_text.TEXT_NAME
    assert result_of(tmp_path)["texts"] == 8
    config = whole_config(written)
    config.validation_text, config.tokenizer = str(tiny_text), str(next(tiny_run.glob("tokenizer-*.json")))
    data = train.load_training_data(config, tmp_path)
    tokens = len(data.tokenizer.encode(written.read_text()).ids)
    assert data.train.size == tokens // 16 * 16
    assert data.tokenizer.decode(data.validation[0].tolist()) in tiny_text.read_text()


def test_another_vocabulary_is_rejected(tiny_run, tiny_text, tmp_path):
    model = tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), tmp_path / "model")
    config = whole_config(tiny_text)
    config.distillation.teacher = str(model)
    with pytest.raises(ValueError, match="the teacher .* has another vocabulary"):
        train.main(config, tmp_path / "run")
    np.save(tmp_path / "ids.npy", np.arange(2000) % 300)
    config = whole_config(tmp_path / "ids.npy")
    with pytest.raises(ValueError, match="holds token ids: name the tokenizer.json"):
        train.main(config, tmp_path / "run")
    (config.tokenizer,) = map(str, tiny_run.glob("tokenizer-*.json"))
    with pytest.raises(ValueError, match=r"token ids span 0..299, outside the vocabulary 0..279"):
        train.main(config, tmp_path / "run")
    config = whole_config(tiny_text)
    config.pretrained, config.vocab_size = str(model), 500
    config.tokenizer = str(tmp_path / "large.json")
    train.load_training_data(whole_config(tiny_text), tmp_path).tokenizer.save(config.tokenizer)
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
        ("batch_size", 10**6, "batch_size=1000000 must be from 1 to .*, the number of training windows"),
        ("vocab_size", 100, "vocab_size=100 must be above 256"),
        ("validation_every", 100, "too short for one validation window of 16 tokens"),
        ("steps", 0, "steps must be at least 1"),
        ("text", "/nowhere.txt", "no text at /nowhere.txt"),
        ("tokenizer", "/nowhere.json", "no tokenizer at /nowhere.json"),
    ],
)
def test_impossible_configs_are_rejected(tiny_text, tmp_path, field, value, message):
    config = whole_config(tiny_text)
    config.update_from_flattened_dict({field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main(config, tmp_path)
    assert not (tmp_path / METRICS_NAME).exists()


def test_packed_models_are_rejected(tiny_run, tiny_text, tmp_path):
    config = whole_config(tiny_text)
    config.pretrained = str(tiny_run / train.MODEL_NAME)
    with pytest.raises(ValueError, match="has packed layers .*: training starts from a float model"):
        train.main(config, tmp_path)


@pytest.mark.parametrize(
    "module", [tiny_w1a1, tiny_w2a2, tiny_ternary_a8, tiny_bf16], ids=lambda module: module.__name__
)
@pytest.mark.covered("a whole run, by the tests above; products of few bits, by nn/test_dot_general.py")
def test_each_config_takes_its_first_steps(module, tiny_text, tmp_path):
    config = shrink(module.get_config(), tiny_text)
    config.steps, config.optimizer.warmup_steps, config.batch_size = 2, 1, 1
    train.main(config, tmp_path)
    assert result_of(tmp_path)["packed"]["loss"] == result_of(tmp_path)["evaluations"][-1]["loss"]


def test_an_unknown_config_is_reported_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--config=configs/tiny_w0a0.py", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "tiny_w0a0.py" in done.stderr.strip().splitlines()[-1]
