"""The matmul experiments on tiny shapes: the Hopper kernels interpreted, or XLA in their place."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES, FEW_TOKENS, plan_product
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import decode_tiling, decode_tilings
from bipolar_jax.tuning import table as tuning_table
from configs.bench import ablation as ablation_config
from configs.bench import matmul as bench_config
from configs.bench import tune as tune_config
from experiments.bench import ablation, matmul, tune
from experiments.bench.products import ablation_variants, cold_weights, exactness
from experiments.bench.products.candidates import Product
from experiments.bench.products.operands import Operands
from experiments.bench.products.shapes import Shape
from experiments.support import timing
from experiments.support.workdir import RESULT_NAME
from tests.support.optimizations import optimizations

PNG = b"\x89PNG"


def tiny(config, **fields):
    """A config that takes seconds."""
    config.iterations, config.compile_threads = 2, 2
    for name, value in fields.items():
        config[name] = value
    return config


def bench(**fields):
    return tiny(bench_config.get_config(), **{"implementation": "xla", "shapes": "24x40x96"} | fields)


def read(folder):
    return json.loads((folder / RESULT_NAME).read_text())


@pytest.fixture(scope="module")
def kernels_run(tmp_path_factory):
    """A run of the benchmark on the interpreted kernels."""
    folder = tmp_path_factory.mktemp("bench")
    config = bench(
        implementation="sm90", shapes="4x40x96", precisions="W2A1,W4A8g32", quantizer_elements=1, iterations=1
    )
    with interpreted(InterpretGPUParams()), optimizations(False):
        matmul.main(config, folder)
    return folder


@pytest.fixture(scope="module")
def xla_run(tmp_path_factory):
    """A run on XLA, with exactness and a peer that is not installed."""
    folder = tmp_path_factory.mktemp("bench_xla")
    matmul.main(bench(precisions="W2A1,W1.58A3", shapes="24x40x96", peers="humming"), folder)
    return folder


# The benchmark.


def test_kernels_are_timed_with_their_tiling(kernels_run):
    result = read(kernels_run)
    row = result["shapes"]["4x40x96"]
    assert {name: measured["kind"] for name, measured in row["precisions"].items()} == {
        "W2A1": "planes",
        "W4A8g32": "int8",
    }
    parts = {"W2A1": ("kernel", "operation"), "W4A8g32": ("product", "operation")}
    for name, measured in row["precisions"].items():
        assert measured["compared"] == (4 * 40 if "kernel" in parts[name] else 0)  # groups have no integer product
        if name == "W4A8g32":
            Tiling(**measured["tiling"]).check()
        else:
            assert measured["tiling"] == dataclasses.asdict(decode_tiling(4, 96, 1))
        for part in parts[name]:
            assert measured[part]["microseconds"] > 0
            assert measured[part]["error"] < 2**-7
            assert measured[part]["speedup"] == pytest.approx(
                row["bf16"]["microseconds"] / measured[part]["microseconds"], abs=1e-3
            )
    assert row["int8"]["microseconds"] > 0
    assert list(result["quantizers"]["4x96"]) == ["copy", "8 bits, int8", "1 bits, planes"]
    assert all(figures["terabytes_per_second"] >= 0 for figures in result["quantizers"]["4x96"].values())


@pytest.mark.parametrize("w_bits", [3, 8])
def test_int8_kernels_pass_their_check(w_bits):
    """Weights as values, and of 8 bits as codes."""
    shape = Shape("s", 70, 40, 100)
    product, operands = Product(shape, BipolarFormat(8), BipolarFormat(w_bits), "sm90"), Operands(shape, 0)
    assert product.kind == "int8"
    with interpreted(InterpretGPUParams()):
        function, args = product.kernel(operands)
        output = jax.jit(function)(*args)
    assert product.check_kernel(operands, output) < 2**-7
    with pytest.raises(ValueError, match="beyond what rounding explains"):
        product.check_kernel(operands, output * 1.01)


def test_other_backends_have_the_operation_alone(xla_run):
    for row in read(xla_run)["shapes"].values():
        for measured in row["precisions"].values():
            assert measured["kernel"] is None
            assert measured["operation"]["microseconds"] > 0
        assert row["peers"] == {"humming": {"error": "torch is not installed"}}


@pytest.mark.parametrize("name", ["speedup.png", "roofline.png"])
def test_plots_are_pngs(kernels_run, xla_run, name):
    for folder in (kernels_run, xla_run):
        assert (folder / name).read_bytes().startswith(PNG)


def test_a_run_goes_on_and_tries_again_what_failed(tmp_path, monkeypatch):
    original = Product.check_integers

    def broken(self, *args):
        if self.a_format.bits == 2:
            raise ValueError("planted\nfailure")
        return original(self, *args)

    monkeypatch.setattr(Product, "check_integers", broken)
    matmul.main(bench(precisions="W1A1,W1A2"), tmp_path)
    precisions = read(tmp_path)["shapes"]["24x40x96"]["precisions"]
    assert precisions["W1A2"] == {"error": "ValueError: planted"}
    assert "operation" in precisions["W1A1"]
    monkeypatch.undo()
    checked = []
    monkeypatch.setattr(Product, "check_integers", lambda self, *a: checked.append(self.a_format) or original(self, *a))
    matmul.main(bench(precisions="W1A1,W1A2"), tmp_path)
    assert checked == [BipolarFormat(2)]
    again = read(tmp_path)["shapes"]["24x40x96"]["precisions"]
    assert again["W1A1"] == precisions["W1A1"]
    assert "operation" in again["W1A2"]
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        matmul.main(bench(seed=1), tmp_path)


def test_wrong_integers_are_an_error_not_a_timing(tmp_path, monkeypatch):
    monkeypatch.setattr(Operands, "exact_integers", lambda self, *_: np.zeros((24, 40), np.int64))
    matmul.main(bench(precisions="W1A1"), tmp_path)
    row = read(tmp_path)["shapes"]["24x40x96"]["precisions"]["W1A1"]
    assert list(row) == ["error"]
    assert row["error"].startswith("ValueError: wrong integers")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"implementation": "cuda"}, "implementation must be one of"),
        ({"implementation": "sm90"}, "nothing to measure: its kernels need an NVIDIA GPU"),
        ({"peers": "torch,cutlass"}, "no peer cutlass: there are torch, gemlite, humming"),
        ({"precisions": "int4"}, "is not of the form"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        matmul.main(bench(**fields), tmp_path)
    assert not (tmp_path / RESULT_NAME).exists()


def test_exactness_counts_whole_products(monkeypatch):
    monkeypatch.setattr(exactness, "BACKENDS", {"xla": _NumpyBackend})
    monkeypatch.setattr(
        exactness, "compile_all", lambda calls, threads: {name: function for name, (function, _) in calls.items()}
    )
    config, result, saved = bench(exactness_shapes=2, exactness_size=9), {}, []
    exactness.measure_exactness(config, result, lambda: saved.append(1))
    found = result["exactness"]
    assert (found["products"], found["exact"], found["wrong"], saved) == (144, 144, 0, [1])
    exactness.measure_exactness(config, result, lambda: saved.append(1))
    assert saved == [1]
    monkeypatch.setattr(_NumpyBackend, "error", 1)
    exactness.measure_exactness(bench(exactness_shapes=1, exactness_size=9), result, lambda: None)
    assert result["exactness"]["wrong"] == 72
    assert "numbers are wrong" in next(iter(result["exactness"]["failures"].values()))


class _NumpyBackend:
    """Products of values decoded from the planes, without compiling."""

    error = 0

    @classmethod
    def integer_matmul(cls, codes, w, a_format):
        bits = np.unpackbits(w.planes.view(np.uint8), axis=-1, count=codes.shape[1], bitorder="little").astype(int)
        w_values = 2 * np.tensordot(w.format.plane_weights, bits, axes=1) - w.format.max_value
        np.testing.assert_array_equal(w.row_sums[:, 0] * 2, (w_values + w.format.max_value).sum(axis=1))
        return ((2 * codes.astype(int) - a_format.max_value) @ w_values.T + cls.error)[..., None]


def test_ragged_sizes_are_no_multiples():
    rng = np.random.default_rng(0)
    sizes = [exactness._ragged_sizes(rng, 700, few_tokens=False) for _ in range(50)]
    assert all(size % 8 for some in sizes for size in some)
    assert max(map(max, sizes)) <= 701
    few = [exactness._ragged_sizes(rng, 700, few_tokens=True) for _ in range(50)]
    tokens = {m for m, _, _ in few}
    assert tokens <= set(range(1, 65))
    assert min(tokens) <= 8
    assert max(tokens) > 56  # in parts, where they have many planes
    assert max(map(max, few)) > 600


# The tuner.


def test_problems_are_measured_once_and_their_best_tiling_is_written(tmp_path, monkeypatch):
    times = []

    def measured(function, *args, iterations):
        times.append(100.0 - len(times))
        return timing.Timing.of(times[-1:], "wall")

    monkeypatch.setattr(tune, "measure", measured)
    config = tiny(tune_config.get_config(), shapes="65x40x96", precisions="W2A1,W1A2", per_problem=2, variations=1)
    config.table = str(tmp_path / "table.json")
    other = {"kind": "int8", "m": 1, "n": 2, "steps": 3, "shape": "kept", "tiling": {}}
    (tmp_path / "table.json").write_text(json.dumps({"device": "cpu", "entries": [other]}))
    with interpreted(InterpretGPUParams()):
        tune.main(config, tmp_path)
        assert len(times) == 3
        tune.main(config, tmp_path)
        assert len(times) == 3
    problems = read(tmp_path)["problems"]
    assert list(problems) == ["planes 65x40, 2 steps"]
    entries = json.loads((tmp_path / "table.json").read_text())["entries"]
    assert entries[0] == other
    (entry,) = entries[1:]
    Tiling(**entry["tiling"]).check()
    assert (entry["kind"], entry["m"], entry["n"], entry["steps"]) == ("planes", 65, 40, 2)
    assert entry["microseconds"] == times[-1] == min(times)


def test_few_tokens_are_tuned_on_cold_weights_and_planned_from_the_table(tmp_path, monkeypatch):
    copies = []

    def measured(function, *args, iterations):
        copies.append(len(args))
        return timing.Timing.of([100.0 - 10 * len(copies)], "wall")

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setattr(cold_weights, "copies_of", lambda weights: 2)
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
    assert plan_product(40, 40, 96, *formats).tiling == decode_tilings(40, 96, 1, 2)[0]  # of other sizes
    tuning_table.nearest_entry.cache_clear()
    monkeypatch.undo()
    assert plan_product(4, 40, 96, *formats).tiling == slower


def test_first_tilings_are_legal_and_begin_with_the_planners():
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
    (row,) = read(tmp_path)["problems"].values()
    assert {figures["error"] for figures in row["tilings"].values()} == {"ValueError: planted"}
    assert json.loads((tmp_path / "table.json").read_text())["entries"] == []


# The ablation.


def test_every_variant_is_checked_and_timed(tmp_path):
    config = tiny(ablation_config.get_config(), shapes="65x40x96", precisions="W1A2", iterations=1)
    with interpreted(InterpretGPUParams()):
        ablation.main(config, tmp_path)
    (row,) = read(tmp_path)["products"].values()
    assert list(row["variants"]) == [
        "full system",
        "signed planes",
        "packed in the call",
        "recovered in memory",
        "fixed tiling",
        "XLA bf16",
    ]
    assert row["variants"]["full system"]["slowdown"] == 1
    assert all(math.isfinite(figures["slowdown"]) for figures in row["variants"].values())
    assert (tmp_path / "ablation.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("precision", ["W8A8", "W1.58A2"])
def test_ablation_without_signed_planes_is_refused(tmp_path, precision):
    config = tiny(ablation_config.get_config(), shapes="65x40x96", precisions=precision)
    with pytest.raises(ValueError, match=f"{precision} does not multiply planes of two's complement"):
        ablation.main(config, tmp_path)


@pytest.mark.parametrize(
    ("program", "config", "precision", "message"),
    [
        (ablation, ablation_config, "W1A1", "has none of these parts"),
        (tune, tune_config, "W1A8", "tokens in 2 parts have one tiling"),
    ],
)
def test_products_of_few_tokens_are_refused(tmp_path, program, config, precision, message):
    with interpreted(InterpretGPUParams()), pytest.raises(ValueError, match=message):
        program.main(tiny(config.get_config(), shapes="64x40x96", precisions=precision), tmp_path)


@pytest.mark.parametrize(("program", "config"), [(ablation, ablation_config), (tune, tune_config)])
def test_hopper_kernels_are_refused_elsewhere(tmp_path, program, config):
    with pytest.raises(ValueError, match="nothing to measure: its kernels need an NVIDIA GPU"):
        program.main(tiny(config.get_config(), shapes="65x40x96", precisions="W1A1"), tmp_path)
    assert not (tmp_path / RESULT_NAME).exists()


@pytest.mark.parametrize("a_bits", [1, 2, 3])
@pytest.mark.parametrize("w_bits", [1, 2, 3])
def test_signed_groups_add_up_to_twos_complement(a_bits, w_bits):
    """Horner's rule over the groups, on numbers in place of accumulators."""
    formats = BipolarFormat(a_bits), BipolarFormat(w_bits)
    recovery = ablation_variants._SignedRecovery("planes", *formats, 8, with_zero=True)
    rng = np.random.default_rng(0)
    x, w = (rng.integers(0, 2, (fmt.bits, 1, 8)) for fmt in formats)
    total = np.zeros((), np.int64)
    for factor, pairs in recovery.pair_groups():
        total = total * factor + sum(int(x[i, 0] @ w[j, 0]) for i, j in pairs)
    values = [
        np.tensordot(ablation_variants._signed_weights(fmt), some, axes=1)[0]
        for fmt, some in zip(formats, (x, w), strict=True)
    ]
    assert total * recovery.product_weight == values[0] @ values[1]
    assert recovery.num_pairs == a_bits * w_bits
