"""experiments/bench/llm.py with a model that is cut over two devices."""

from __future__ import annotations

import json

import pytest

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.sharding.sharded_transformer import ShardedTransformer
from configs.bench import llm as llm_config
from experiments.bench import llm
from experiments.support.workdir import RESULT_NAME

CONFIG = TransformerConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=64,
    context_length=64,
)


def config_of(model: int):
    config = llm_config.get_config()
    fields = {"precisions": "W2A2", "workloads": "2x5+3", "baselines": "", "profile": "", "iterations": 1}
    for name, value in fields.items():
        config[name] = value
    config.mesh.model = model
    return config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(llm, "preset", lambda name: CONFIG)


def test_the_mesh_of_the_config_cuts_packed_models():
    config, precision = config_of(2), llm.bj.Precision.parse("W2A2")
    model = llm.make_model(config, CONFIG, precision)
    assert isinstance(model, ShardedTransformer)
    assert (model.plan.data, model.plan.model) == (1, 2)
    assert llm.num_devices(config) == 2
    assert not isinstance(llm.make_model(config_of(1), CONFIG, precision), ShardedTransformer)


@pytest.mark.covered("test_a_mesh_of_eight_in_two_processes, and the bench of models on one device")
def test_a_cut_model_is_timed(tmp_path):
    llm.main(config_of(2), tmp_path)
    result = json.loads((tmp_path / RESULT_NAME).read_text())
    assert result["settings"]["mesh"] == {"data": 1, "model": 2, "cut_positions": False, "cut_tokens": True}
    measured = result["models"]["W2A2"]["workloads"]["2x5+3"]
    assert measured["prefill"]["microseconds"] > 0
    assert measured["decode"]["microseconds"] > 0
    assert measured["check_error"] < 0.5
