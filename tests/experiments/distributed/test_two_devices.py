"""The page of one device beside two: ratios from the figures of experiments/bench/llm.py, and a tiny run of both."""

from __future__ import annotations

import json

import pytest

from configs.distributed import two_devices as two_devices_config
from experiments.bench import llm
from experiments.distributed import two_devices
from tests.experiments.bench.language_models.test_sharded_bench import CONFIG


def figures(tokens_per_second: float, exchanged: str) -> dict:
    phase = {"microseconds": 1e6 / tokens_per_second, "tokens_per_second": tokens_per_second}
    return {"prefill": phase, "decode": phase, "collectives": {"prefill": [exchanged], "decode": []}}


def test_the_page_has_ratios_beside_those_asked_for(tmp_path, monkeypatch):
    meshes = []

    def measured(config, workdir):
        meshes.append((config.model, config.workloads, config.mesh.data, config.mesh.model))
        rows = {"workloads": {config.workloads: figures(100.0 + 60 * (config.mesh.model == 2), "all-reduce s32[4]")}}
        models = dict.fromkeys(config.precisions.split(","), rows)
        (workdir / "result.json").write_text(json.dumps({"models": models}))

    monkeypatch.setattr(llm, "main", measured)
    two_devices.main(two_devices_config.get_config(), tmp_path)
    assert meshes == [
        ("llama-2-70b", "1x2048+64", 1, 1),
        ("llama-2-70b", "1x2048+64", 1, 2),
        ("llama-3-8b", "16x512+64", 1, 1),
        ("llama-3-8b", "32x512+64", 2, 1),
    ]
    page = (tmp_path / two_devices.PAGE).read_text().splitlines()
    assert "| llama-2-70b | W4A8g128 | prefill | 10,000 | 6,250 | 1.60 | 1.5 |" in page
    assert "| llama-2-70b | W2A2 | decode | 10,000 | 6,250 | 1.60 |  |" in page
    assert "- llama-2-70b, W2A2, prefill: all-reduce s32[4]" in page
    assert "- llama-3-8b, W4A8, decode: nothing" in page


@pytest.mark.covered("the test above, and the bench of models on meshes")
def test_one_device_and_two_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "preset", lambda name: CONFIG)
    config = two_devices_config.get_config()
    config.iterations = 1
    for case in config.cases.values():
        case.workload = "2x5+3"
    config.cases["llama-2-70b"].precisions = "W4A8g16,W2A2"
    config.cases["llama-3-8b"].workload_of_two = "4x5+3"
    two_devices.main(config, tmp_path)
    page = (tmp_path / two_devices.PAGE).read_text()
    assert "- llama-3-8b, W4A8, prefill: nothing" in page
    assert "u32" not in page  # no packed weights
