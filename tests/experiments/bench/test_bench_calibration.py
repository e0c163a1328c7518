"""experiments/bench/calibration.py on a tiny model."""

from __future__ import annotations

import json

import pytest

from bipolar_jax.models.config import TransformerConfig
from configs.bench import calibration as bench_config
from experiments.bench import calibration
from experiments.support.workdir import RESULT_NAME

_TINY = TransformerConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=16,
    context_length=128,
    tie_embeddings=True,
)


@pytest.mark.usefixtures("compiled_programs")
def test_parts_are_timed_and_their_compilations_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "preset", lambda name: _TINY)
    # One shape of layers and the shortest stage of rounding are enough to run all of the program.
    monkeypatch.setattr(calibration, "_STAGES", {"grid": calibration._STAGES["grid"]})
    config = bench_config.get_config()
    config.precision, config.blocks, config.windows, config.length, config.windows_per_step = "W4A8", 1, 2, 8, 2
    config.rotation, config.iterations, config.parts = "none", 1, "moments,rounding"
    calibration.main(config, tmp_path)
    parts = json.loads((tmp_path / RESULT_NAME).read_text())["parts"]
    assert parts["grid, 48 x 16"]["seconds"] > 0
    assert parts["moments of one step, ffn/down_proj"]["compilations"] == 1
    assert parts["one step of a block, float"]["peak_gb"] > 0
