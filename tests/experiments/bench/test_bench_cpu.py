"""experiments/bench/cpu.py on a tiny checkpoint."""

from __future__ import annotations

import json
import time

import pytest

from configs.bench import cpu as bench_config
from experiments.bench import cpu
from experiments.support.workdir import RESULT_NAME
from tests.support import tiny_checkpoints


def test_models_are_timed_beside_float32(tmp_path, monkeypatch):
    config = bench_config.get_config()
    config.model = str(tiny_checkpoints.write_gguf(tiny_checkpoints.make(), tmp_path / "model.gguf"))
    config.precisions, config.prompt_tokens, config.new_tokens, config.rounds = "W4A8", 4, 2, 2

    # Without models to run there is nothing to compile; `generate` has tests of its own.
    def generate(model, prompts, length, end_ids):
        time.sleep(1e-3 * length)
        return [[1] * length for _ in prompts]

    monkeypatch.setattr(cpu, "generate", generate)
    cpu.main(config, tmp_path / "workdir")
    models = json.loads((tmp_path / "workdir" / RESULT_NAME).read_text())["models"]
    assert list(models) == ["float32", "W4A8", "W4A8, packed"]
    assert models["float32"]["times_float32"] == 1
    assert len(models["W4A8"]["token_ms_of_each_round"]) == 2
    assert models["W4A8, packed"]["bytes"] < models["W4A8"]["bytes"] < models["float32"]["bytes"]


def test_other_tokens_than_those_of_packed_weights_are_an_error(monkeypatch):
    tokens = iter([[[1, 2]], [[1, 3]]])
    monkeypatch.setattr(cpu, "generate", lambda *_, **__: next(tokens))
    with pytest.raises(ValueError, match="W4A8: the prepared model writes"):
        cpu._check_tokens("W4A8", None, None, [1])
