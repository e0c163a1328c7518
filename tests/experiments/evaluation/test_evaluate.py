"""experiments/evaluate.py on tiny models: figures of each, paired differences, questions, resuming, errors."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from bipolar_jax.models.inference.continuations import score_continuations
from bipolar_jax.models.inference.perplexity import Perplexity, perplexity
from bipolar_jax.models.loaders import load_pretrained
from configs import evaluate as evaluate_config
from experiments import evaluate
from experiments.evaluation.multiple_choice import continuation_ids, read_questions
from experiments.support import workdir
from tests.support import tiny_checkpoints

pytestmark = pytest.mark.usefixtures("compiled_programs")
QUESTIONS = [
    {"question": "the quick brown", "choices": ["fox", "dog and the lazy dog"], "answer": 0},
    {"question": "it's not the first ", "choices": ["time", "jump", "1984"], "answer": 2},
    {"question": "In 1984 there were", "choices": ["365 days", "hello"], "answer": 1},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return [tiny_checkpoints.write_huggingface(tiny_checkpoints.make(seed=seed), folder / f"{seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def config(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times, 1859. " * 20)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    config = evaluate_config.get_config()
    config.model, config.against = map(str, models)
    config.text, config.questions = str(folder / "text.txt"), str(folder / "questions.jsonl")
    config.windows, config.window_length = 3, 16
    return config


@pytest.fixture(scope="module")
def run(config, compiled_programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    evaluate.main(config, folder)
    return folder


def read(folder):
    return json.loads((folder / workdir.RESULT_NAME).read_text())


def test_perplexities_and_their_paired_difference(run, config, models):
    result = read(run)
    loaded = [load_pretrained(path) for path in models]
    ids = loaded[0].tokenizer.encode(Path(config.text).read_text(), add_special_tokens=False).ids
    losses = []
    for name, each in zip(("model", "against"), loaded, strict=True):
        scored = perplexity(each.model, ids, windows=3, window_length=16)
        assert result["models"][name]["text"]["perplexity"] == scored.perplexity
        assert result["models"][name]["text"]["standard_error"] == scored.standard_error
        losses.append(np.array(scored.window_losses))
    difference, found = losses[0] - losses[1], result["difference"]["text"]
    assert found["loss"] == pytest.approx(difference.mean())
    assert found["standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(3))
    assert found["relative_perplexity"] == pytest.approx(math.exp(difference.mean()))


def test_the_answer_is_the_likeliest_choice_and_by_length_the_likeliest_by_byte(run, models):
    for name, path in zip(("model", "against"), models, strict=True):
        pretrained = load_pretrained(path)
        expected = {"right": [], "right_by_length": []}
        for each in QUESTIONS:
            pairs = [continuation_ids(pretrained, each["question"], choice) for choice in each["choices"]]
            logprobs = [scored.logprob for scored in score_continuations(pretrained.model, pairs)]
            by_length = [a / len(choice) for a, choice in zip(logprobs, each["choices"], strict=True)]
            expected["right"].append(int(np.argmax(logprobs)) == each["answer"])
            expected["right_by_length"].append(int(np.argmax(by_length)) == each["answer"])
        row = read(run)["models"][name]["questions"]
        assert {kind: row[kind] for kind in expected} == expected
        assert row["accuracy"] == pytest.approx(np.mean(expected["right"]))
    rows = read(run)["models"]
    right = [np.array(rows[name]["questions"]["right"], int) for name in ("model", "against")]
    found = read(run)["difference"]["right"]
    assert found["difference"] == pytest.approx((right[0] - right[1]).mean())
    assert found["standard_error"] == pytest.approx((right[0] - right[1]).std(ddof=1) / math.sqrt(3))


def test_choices_are_tokens_of_the_whole_text(models):
    pretrained = load_pretrained(models[0])
    context, choice = continuation_ids(pretrained, "the quick ", " brown fox")
    assert pretrained.tokenizer.decode(context + choice) == "the quick brown fox"
    assert pretrained.tokenizer.decode(choice) == " brown fox"


def test_a_model_that_was_measured_is_not_run_again(run, config, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_model_source", None)
    before = read(run)
    evaluate.main(config, run)
    after = read(run)
    assert after["models"] == before["models"]
    assert after["difference"] == before["difference"]
    printed = capsys.readouterr().out
    assert "paired difference" in printed
    assert "accuracy by length, 3 questions" in printed


def test_other_settings_are_refused(run, config):
    other = config.copy_and_resolve_references()
    other.windows = 2
    with pytest.raises(ValueError, match="windows: stored 3, now 2"):
        evaluate.main(other, run)


def test_nothing_to_evaluate_is_refused(config, tmp_path):
    other = config.copy_and_resolve_references()
    other.text = other.questions = ""
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate.main(other, tmp_path)


def test_tasks_without_the_harness_name_the_extra(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    other = config.copy_and_resolve_references()
    other.tasks = "arc_easy"
    with pytest.raises(ModuleNotFoundError, match=r"lm_eval is not installed: pip install 'bipolar_jax\[eval\]'"):
        evaluate.main(other, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2 is no question"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "line 2: answer 0 must be the index of one of at least 2"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 must be the index"),
        ('{"question": "a", "choices": ["b", ""], "answer": 1}', "must be texts that are not empty"),
        ('{"question": "a", "choices": ["b", "c"], "answer": tru}', "line 2 is no question"),
    ],
)
def test_damaged_questions_are_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_files_without_questions_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no questions at"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no questions"):
        read_questions(tmp_path / "empty.jsonl")


def test_gguf_files_are_served_at_their_own_precision(tmp_path, config, monkeypatch):
    """`activations` is for the model alone; the one that it is compared with is dequantized."""
    path = tiny_checkpoints.write_gguf(tiny_checkpoints.make(), tmp_path / "model.gguf", "Q4_1")
    monkeypatch.setattr(evaluate, "scored_windows", lambda source, model, *_, **__: Perplexity(1.0, 0.0, 1, 1, (0.0,)))
    changes = {"model": str(path), "against": str(path), "activations": 8, "questions": ""}
    evaluate.main(ConfigDict(config.to_dict() | changes), tmp_path)
    rows = read(tmp_path)["models"]
    assert [rows[name]["linear_bits"] for name in ("model", "against")] == [5.0, None]
