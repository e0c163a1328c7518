"""experiments/bench/first_call.py: stages of a tiny model, and what a cache holds."""

from __future__ import annotations

import json
import zlib

import pytest

from configs.bench import first_call as bench_config
from experiments.bench import first_call
from experiments.bench.language_models.first_text import Settings, exclusive_seconds, measure
from experiments.support.workdir import RESULT_NAME

TINY = dict(
    vocab_size=64, hidden_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, ffn_size=64, bos_id=None
)


def test_a_moment_counts_once():
    spans = [
        ("trace", "f", 0.0, 10.0),
        ("trace", "g", 2.0, 3.0),
        ("lower", "f", 10.0, 11.0),
        ("compile", "f", 11.0, 15.0),
        ("cache", "f", 11.0, 14.0),
        ("compile", "constant", 4.0, 5.0),
    ]
    assert exclusive_seconds(spans) == {"cache": 3.0, "compile": 2.0, "lower": 1.0, "trace": 9.0}


@pytest.mark.covered("by `python -m experiments.bench.first_call`, in fresh processes; what it adds up, here")
def test_stages_add_up(tmp_path):
    config = bench_config.get_config()
    config.new_tokens, config.prompt_tokens, config.layers = 2, 4, 1
    first_call.main(config, tmp_path)
    rows = json.loads((tmp_path / RESULT_NAME).read_text())["models"]["smollm2-135m W4A8"]
    empty, kept = (rows[name] for name in first_call.PROCESSES)
    assert empty["to_the_text_s"] < empty["process_s"]
    assert kept["stages"]["first text"]["cache_hits"] == kept["stages"]["first text"]["programs"] == 2
    assert rows["cache"]["entries"] > 2


@pytest.mark.covered("programs of a text are counted by models/inference/test_generation.py")
def test_a_first_text_is_two_programs():
    """In this process; `generate` must not compile more, which a GPU takes seconds for."""
    stages = measure(Settings("smollm2-135m", TINY, "W4A8", 4, 3, None))["stages"]
    assert stages["first text"]["programs"] == 2
    assert stages["second text"]["programs"] == 0
    for row in stages.values():
        parts = sum(row[kind] for kind in (*first_call.EVENTS, "rest"))
        assert parts == pytest.approx(row["seconds"], abs=0.01)


def test_entries_with_kernels_are_counted(tmp_path):
    (tmp_path / "one-cache").write_bytes(zlib.compress(b"mosaic.gpu.CustomCallResources\x7fELF"))
    (tmp_path / "two-cache").write_bytes(zlib.compress(b"ML\xefR quantize_rows_mosaic_gpu"))
    (tmp_path / "two-atime").write_bytes(b"")
    found = first_call.cache_contents(tmp_path)
    assert (found["entries"], found["with_kernels"]) == (2, 1)


def test_an_unknown_model_is_refused(tmp_path):
    config = bench_config.get_config()
    config.models = "smollm"
    with pytest.raises(ValueError, match="smollm2-135m"):
        first_call.main(config, tmp_path)
