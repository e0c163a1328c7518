"""experiments/bench/tune.py on tiny shapes and the interpreted Hopper kernels."""

from __future__ import annotations

import dataclasses
import json

import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES, FEW_TOKENS, plan_product
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import decode_tilings
from bipolar_jax.tuning import table as tuning_table
from configs.bench import tune as tune_config
from experiments.bench import tune
from experiments.bench.products import cold_weights
from experiments.bench.products.product import Product
from experiments.bench.products.shapes import Shape
from experiments.support import timing
from tests.support.tiny_benchmarks import result_of, tiny


def test_problems_are_measured_once_and_their_best_tiling_is_written(tmp_path, monkeypatch):
    times = []

    def measured(function, *args, iterations):
        times.append(100.0 - len(times))
        return timing.Timing.of(times[-1:], "wall")

    monkeypatch.setattr(tune, "measure", measured)
    config = tiny(tune_config.get_config(), shapes="65x40x96", precisions="W2A1,W1A2", per_problem=2, variations=1)
    config.table = str(tmp_path / "table.json")
    other = {"kind": "int8", "m": 1, "n": 2, "steps": 3, "shape": "kept", "microseconds": 4.5}
    other["tiling"] = dataclasses.asdict(Tiling())
    (tmp_path / "table.json").write_text(json.dumps({"device": "cpu", "entries": [other]}))
    with interpreted(InterpretGPUParams()):
        tune.main(config, tmp_path)
        assert len(times) == 3
        tune.main(config, tmp_path)
        assert len(times) == 3
    problems = result_of(tmp_path)["problems"]
    assert list(problems) == ["planes 65x40, 2 steps"]
    entries = json.loads((tmp_path / "table.json").read_text())["entries"]
    assert entries[0] == other
    (entry,) = entries[1:]
    Tiling(**entry["tiling"]).check()
    assert (entry["kind"], entry["m"], entry["n"], entry["steps"]) == ("planes", 65, 40, 2)
    assert entry["microseconds"] == times[-1] == min(times)


@pytest.mark.covered("tuning, by the test above; plans of few tokens, by kernels/sm90/backend/test_planning.py")
def test_few_tokens_are_tuned_on_cold_weights_and_planned_from_the_table(tmp_path, monkeypatch):
    copies = []

    def measured(function, *args, iterations):
        copies.append(len(args))
        return timing.Timing.of([100.0 - 10 * len(copies)], "wall")

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setattr(cold_weights, "copies_of", lambda *_: 2)
    config = tiny(tune_config.get_config(), shapes="4x40x96", precisions="W2A1", table=str(tmp_path / "table.json"))
    with interpreted(InterpretGPUParams()):
        tune.main(config, tmp_path)
    assert copies == [2, 2]
    table = json.loads((tmp_path / "table.json").read_text())
    (entry,) = table["entries"]
    assert (entry["kind"], entry["m"], entry["n"], entry["steps"]) == (FEW_TOKENS, 8, 40, 2)
    assert entry["microseconds"] == 40.0
    slower, fastest = decode_tilings(4, 96, 1, 2)
    assert entry["tiling"] == dataclasses.asdict(fastest)
    monkeypatch.setattr(tuning_table, "load_table", lambda device: table)
    tuning_table.nearest_entry.cache_clear()
    formats = BipolarFormat(1), BipolarFormat(2)
    assert plan_product(4, 40, 96, *formats).tiling == fastest
    assert plan_product(40, 40, 96, *formats).tiling == decode_tilings(40, 96, 1, 2)[0]  # another problem
    tuning_table.nearest_entry.cache_clear()
    monkeypatch.undo()
    assert plan_product(4, 40, 96, *formats).tiling == slower


def test_first_tilings_are_legal_and_start_with_the_planners_choice():
    product = Product(Shape("s", 4096, 4096, 4096), BipolarFormat(1), BipolarFormat(2), "sm90")
    tilings = tune.first_tilings(product, "all", 12)
    assert tilings[0] == product.choice.tiling
    assert len(set(tilings)) == 12
    assert {tiling.schedule for tiling in tilings} == {"alternate", "split_m", "split_n"}
    for tiling in [*tilings, *tune.variations(tilings[0])]:
        tiling.check()
    assert set(tune.first_tilings(product, "planner", 99)) <= set(CANDIDATES)
    with pytest.raises(ValueError, match='must be "planner" or "all"'):
        tune.first_tilings(product, "some", 1)
    assert any(tiling.cluster_size == 2 for tiling in tune.variations(tilings[0]))


def test_a_tiling_that_fails_is_recorded(tmp_path, monkeypatch):
    def wrong(*_):
        raise ValueError("planted")

    monkeypatch.setattr(Product, "check_kernel", wrong)
    monkeypatch.setattr(tune, "compile_all", lambda calls, threads: {name: lambda *_: None for name in calls})
    config = tiny(tune_config.get_config(), shapes="65x40x96", precisions="W1A1", table=str(tmp_path / "table.json"))
    with interpreted(InterpretGPUParams()):
        tune.main(config, tmp_path)
    (row,) = result_of(tmp_path)["problems"].values()
    assert {figures["error"] for figures in row["tilings"].values()} == {"ValueError: planted"}
    assert json.loads((tmp_path / "table.json").read_text())["entries"] == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"device": "x", "entries": [{"kind": "int8"}]}'])
def test_a_damaged_table_is_named_before_anything_is_timed(tmp_path, content):
    (tmp_path / "table.json").write_bytes(content)
    config = tiny(tune_config.get_config(), shapes="65x40x96", precisions="W1A1", table=str(tmp_path / "table.json"))
    with interpreted(InterpretGPUParams()), pytest.raises(ValueError, match=f"tuning table {tmp_path}/table.json is"):
        tune.main(config, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_an_illegal_tiling_of_a_table_is_named(tmp_path):
    tiling = dataclasses.asdict(Tiling(slots=60))
    entry = {"kind": "int8", "m": 1, "n": 2, "steps": 3, "shape": "x", "microseconds": 4.5, "tiling": tiling}
    (tmp_path / "table.json").write_text(json.dumps({"device": "cpu", "entries": [entry]}))
    with pytest.raises(ValueError, match=r"table.json is damaged: entries\[0\].tiling: .* bytes of shared memory"):
        tune._read_entries(tmp_path / "table.json")


@pytest.mark.parametrize("tilings", [[], {"a": 1}, {"a": {"microseconds": 1.0}}, {"a": {"tiling": {}}}])
def test_a_damaged_result_is_named(tmp_path, tilings):
    row = {"kind": "int8", "m": 1, "n": 2, "steps": 3, "shape": "x", "tilings": tilings}
    with pytest.raises(ValueError, match=r"result.json is damaged: problems\['p'\].tilings"):
        tune._check_tilings(tmp_path / "result.json", {"p": row})
