"""Results, logs and fingerprints: other forms are one ValueError, and what lies beside a model is not its own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.compare_training import _read
from experiments.support.sources import model_fingerprint
from experiments.support.workdir import RESULT_NAME, read_result, write_json
from experiments.training.data import _load_ids
from experiments.training.log import METRICS_NAME, read_metrics
from tests.support import tiny_checkpoints as tiny

ROWS = {"precisions": ("bytes",), "evaluations": ["step"]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "[" * 100_000,
        "{}",
        '{"settings": 5}',
        '{"settings": {}, "precisions": []}',
        '{"settings": {}, "precisions": 5}',
        '{"settings": {}, "precisions": {"W4A8": {}}}',
        '{"settings": {}, "precisions": {"W4A8": null}}',
        '{"settings": {}, "evaluations": {"a": {"step": 1}}}',
        '{"settings": {}, "evaluations": [{"step": "1"}]}',
        "\x00",
    ],
)
def test_results_of_another_form(tmp_path, content):
    (tmp_path / RESULT_NAME).write_text(content)
    with pytest.raises(ValueError, match=f"{RESULT_NAME} is not .*delete it, or choose another --workdir") as caught:
        read_result(tmp_path, {}, ROWS)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match=RESULT_NAME):
        _read(tmp_path)


def test_results_of_the_right_form(tmp_path):
    result = {"settings": {}, "precisions": {"W4A8": {"bytes": 1}}, "evaluations": [{"step": 1}]}
    write_json(tmp_path / RESULT_NAME, result)
    assert read_result(tmp_path, {}, ROWS) == result
    write_json(tmp_path / RESULT_NAME, {"settings": {}})
    assert read_result(tmp_path, {}, ROWS) == {"settings": {}, "precisions": {}, "evaluations": []}


@pytest.mark.parametrize("line", ["5", "[1]", "{}", '{"step": 2}', '{"step": "2", "cross_entropy": 1.0}', "null"])
def test_metrics_of_another_form(tmp_path, line):
    (tmp_path / METRICS_NAME).write_text('{"step": 1, "cross_entropy": 2.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=METRICS_NAME):
        read_metrics(tmp_path)


@pytest.mark.parametrize("end", ['{"step": 2, "cro', "\x00\x00", "[" * 100_000, "\ufffd"])
def test_an_incomplete_last_line_of_metrics_is_dropped(tmp_path, end):
    (tmp_path / METRICS_NAME).write_text('{"step": 1, "cross_entropy": 2.0}\n' + end)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_damaged_ids(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(2000))
    raw = path.read_bytes()
    np.testing.assert_array_equal(_load_ids(path), np.arange(2000))
    damages = [
        raw[:50],
        raw[:500],
        b"",
        b"x" * 200,
        raw.replace(b"(2000,)", b"(2000*9"),
        raw.replace(b"(2000,)", b"(2**9,)"),
        raw.replace(b"(2000,), }         ", b"(2147483648000,), }"),
        raw.replace(b"(2000,), }         ", b"(99999999999999999999,), }")[: len(raw)],
        raw.replace(b"'<i8'", b"'<i9'"),
        raw.replace(b"'<i8'", b"'|O' "),
        raw.replace(b"{'descr", b"{{{{{{{"),
    ]
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ids.npy (is not a NumPy array|holds)"):
            _load_ids(path)


def test_fingerprints_cover_the_files_of_the_model_only(tmp_path):
    directory = tiny.write_huggingface(tiny.make(), tmp_path / "hf", shards=2)
    before = model_fingerprint(str(directory))
    (directory / "notes.txt").write_text("good model")
    (directory / "workdir").mkdir()
    (directory / "result.json").write_text("{}")
    assert model_fingerprint(str(directory)) == before
    (directory / "model-00001-of-00002.safetensors").touch()
    changed = model_fingerprint(str(directory))
    assert changed != before
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"rope_theta": 5.0}))
    assert model_fingerprint(str(directory)) != changed
