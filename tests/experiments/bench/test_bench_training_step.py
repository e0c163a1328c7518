"""experiments/bench/training_step.py on a tiny block and XLA."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import bipolar_jax as bj
from configs.bench import training_step as bench_config
from experiments.bench import training_step
from experiments.support.workdir import RESULT_NAME


def tiny():
    config = bench_config.get_config()
    config.hidden_size, config.ffn_size, config.tokens = 64, 96, 24
    config.precisions, config.iterations, config.profile_most = "W2A2", 2, 0
    return config


@pytest.mark.covered("training, by nn; the clock, by test_bench_matmul.py")
def test_forward_and_step_are_timed_and_compared_with_bf16(tmp_path):
    config = tiny()
    training_step.main(config, tmp_path)
    result = json.loads((tmp_path / RESULT_NAME).read_text())
    assert list(result["precisions"]) == ["bf16", "W2A2"]
    bf16 = result["precisions"]["bf16"]
    for name, measured in result["precisions"].items():
        for function in ("forward", "step"):
            timing = measured[function]
            assert timing["microseconds"] > 0
            assert timing["speedup"] == pytest.approx(bf16[function]["microseconds"] / timing["microseconds"], abs=1e-3)
            assert timing["wall"]["speedup"] > 0
        if name != "bf16":
            assert measured["outputs_compared"] == 24 * 64
            assert measured["integers_compared"] == 24 * 64 * 3
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_a_packed_block_that_differs_is_found(monkeypatch):
    config = tiny()
    block = training_step.make_block(config, bj.Precision(4, 4, calibration="absmax"))
    other = training_step.make_block(config, bj.Precision(4, 4, calibration="minmax"))
    x = jax.random.normal(jax.random.key(0), (1, 24, 64), jnp.bfloat16)
    packed = bj.quantize_model(other)
    monkeypatch.setattr(bj, "quantize_model", lambda block: packed)
    with pytest.raises(ValueError, match=r"of 1536 outputs of the packed block differ"):
        training_step.check_block(block, x, config)


def test_float_activations_are_rejected(tmp_path):
    config = tiny()
    config.precisions = "W4A16"
    with pytest.raises(ValueError, match="W4A16 has float activations"):
        training_step.main(config, tmp_path)
