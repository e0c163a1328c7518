"""experiments/bench/fit_costs.py: coefficients are found again, and shipped ones are those of the shipped results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bipolar_jax.kernels.sm90.backend import cost
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES
from bipolar_jax.tuning.costs import coefficients_of, load_costs
from experiments.bench import fit_costs
from experiments.bench.planning.fitting import Measurement, fit, read

RESULTS = Path(__file__).parents[3] / "experiments" / "results" / "nvidia_h200"


def test_the_fit_finds_the_coefficients_that_made_the_times():
    exact = coefficients_of("tiles")
    measurements = []
    for m, n, steps in ((70, 4096, 30), (777, 3584, 148), (2048, 2560, 24), (8192, 8192, 64), (300, 14336, 9)):
        for tiling in CANDIDATES:
            counts = cost.tile_counts(tiling, m, n, steps)
            measurements.append(Measurement("tiles", f"{m}x{n}", counts, cost.microseconds("tiles", counts)))
    found = fit(measurements, dict.fromkeys(exact, 0.0))
    assert found.high_error < 1e-3
    assert found.largest_loss == 1
    # What nothing measures keeps its value.
    assert fit(measurements, exact).coefficients["pass over splits"] == exact["pass over splits"] > 0


def test_the_shipped_costs_are_fitted_to_the_shipped_results(tmp_path):
    names = load_costs()["kernels"]["tiles"]["results"]
    fit_costs.main([*(str(RESULTS / name) for name in names), f"--out={tmp_path / 'costs.json'}"])
    fitted = json.loads((tmp_path / "costs.json").read_text())["kernels"]
    for kernel, shipped in load_costs()["kernels"].items():
        assert fitted[kernel]["coefficients"] == pytest.approx(shipped["coefficients"], rel=1e-2)
        assert fitted[kernel]["median_error"] < 0.05
        assert fitted[kernel]["mean_loss"] < 1.03


def test_times_of_operations_have_counts_of_their_own(tmp_path):
    tiling = {"tile_m": 128, "tile_n": 128, "schedule": "split_n", "slots": 4, "splits": 2}
    sizes = {"m": 100, "n": 4096, "k": 8192}
    plan = {"tiling": tiling, "kind": "int8", "layout": "tensor_cores", "microseconds": 30.0, "quartiles": [29.0, 30.0]}
    planes = plan | {"layout": "planes", "microseconds": 20.0, "quartiles": [20.0, 20.5]}
    whole = plan | {"tiling": tiling | {"splits": 1}}
    kernels = [{"name": "expanded_matmul_kernel", "microseconds": 8.0}, {"name": "quantize", "microseconds": 3.0}]
    cases = {
        "a": sizes | {"precision": "W4A8g64", "plan": plan, "chosen": {"microseconds": 10.0}, "others": {"x": plan}},
        "unsteady": sizes
        | {"precision": "W4A8", "plan": whole, "chosen": {"quartiles": [9.0, 99.0]}, "kernels": kernels},
        "b": sizes | {"precision": "W8A8", "others": {"x": planes, "failed": {"error": "e"}}},
        "c": sizes | {"precision": "W4A16g128", "others": {"x": planes}},
        "few": sizes | {"precision": "W8A8", "others": {"x": plan | {"tiling": {"warpgroups": 4}}}},
    }
    (tmp_path / "coverage.json").write_text(json.dumps({"cases": cases}))
    cases["unsteady"]["chosen"]["microseconds"] = 50.0
    chosen, other, of_kernel, of_bytes, of_floats = read(tmp_path / "coverage.json")
    assert (chosen.kernel, chosen.microseconds, other.microseconds) == ("expanded", 10.0, 30.0)
    assert (of_kernel.kernel, of_kernel.microseconds) == ("expanded", 8.0)
    assert "operation" not in of_kernel.counts
    assert chosen.counts["quantized numbers"] == 819.2
    assert chosen.counts["further groups of stages"] > 0
    assert chosen.counts["pass over splits"] == chosen.counts["operation"] == 1
    assert (of_bytes.kernel, of_floats.kernel) == ("tiles", "expanded")
    assert of_bytes.counts["bytes of weights"] > of_bytes.counts["quantized numbers"] == 819.2
    assert "quantized numbers" not in of_floats.counts
    (tmp_path / "floats.json").write_text(
        json.dumps(
            {
                "shapes": {
                    "100x4096x8192": {
                        "bf16": {"microseconds": 9.0},
                        "4g128": {
                            "tokens": {"microseconds": 2.0},
                            "128 split_n, 3 slots, 2 splits": {"microseconds": 20.0},
                            "64 alternate, 8 slots, 1 splits": {"error": "e"},
                        },
                    }
                }
            }
        )
    )
    (of_tiling,) = read(tmp_path / "floats.json")
    assert of_tiling.counts["numbers in order"] == 819.2
    assert of_tiling.counts["pass over splits"] == 1
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of"):
        read(tmp_path / "other.json")
