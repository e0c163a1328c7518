"""experiments/bench/eager.py on one small product."""

from __future__ import annotations

import json

import pytest

from configs.bench import eager as bench_config
from experiments.bench import eager
from experiments.support.workdir import RESULT_NAME


def test_calls_are_counted_and_timed(tmp_path):
    config = bench_config.get_config()
    config.pieces, config.size, config.timed_calls, config.memory_calls = "matmul", 32, 2, 2
    eager.main(config, tmp_path)
    row = json.loads((tmp_path / RESULT_NAME).read_text())["pieces"]["matmul"]
    assert row["compilations"] == 0
    assert row["ms"] > 0
    assert row["jitted_ms"] > 0
    assert row["grown_mb"] < 8


def test_unknown_pieces_are_refused(tmp_path):
    config = bench_config.get_config()
    config.pieces = "matmul,nothing"
    with pytest.raises(ValueError, match=r"config.pieces names nothing: choose from matmul, packed layer"):
        eager.main(config, tmp_path)
