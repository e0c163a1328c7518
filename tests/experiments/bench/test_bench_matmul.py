"""experiments/bench/matmul.py on tiny shapes: on XLA, and on the interpreted Hopper kernels."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import decode_tiling
from configs.bench import matmul as bench_config
from experiments.bench import matmul
from experiments.bench.products import exactness
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Product, parse_products
from experiments.bench.products.shapes import Shape
from experiments.support.workdir import RESULT_NAME
from tests.support.optimizations import optimizations
from tests.support.tiny_benchmarks import PNG_SIGNATURE, result_of, tiny


def bench(**fields):
    return tiny(bench_config.get_config(), **{"implementation": "xla", "shapes": "24x40x96"} | fields)


@pytest.fixture(scope="module", params=["W2A1", "W4A8g32f"])
def kernels_run(request, tmp_path_factory):
    """A run of the benchmark on the interpreted kernels."""
    folder = tmp_path_factory.mktemp("bench")
    config = bench(
        implementation="sm90", shapes="4x40x96", precisions=request.param, quantizer_elements=1, iterations=1
    )
    with interpreted(InterpretGPUParams()), optimizations(False):
        matmul.main(config, folder)
    return folder


@pytest.fixture(scope="module")
def xla_run(tmp_path_factory):
    """A run on XLA, with exactness and a peer that is not installed."""
    folder = tmp_path_factory.mktemp("bench_xla")
    matmul.main(bench(precisions="W1.58A3", peers="humming"), folder)
    return folder


@pytest.mark.covered("the program, on XLA below; rows of tilings, by test_bench_tune.py")
def test_kernels_are_timed_with_their_tiling(kernels_run):
    result = result_of(kernels_run)
    row = result["shapes"]["4x40x96"]
    ((name, measured),) = row["precisions"].items()
    if name == "W4A8g32f":
        kind, functions, quantizer = "int8", ("product", "operation"), "8 bits, int8"
        Tiling(**measured["tiling"]).check()
    else:
        kind, functions, quantizer = "planes", ("kernel", "operation"), "1 bits, planes"
        assert measured["tiling"] == dataclasses.asdict(decode_tiling(4, 96, 1))
    assert measured["kind"] == kind
    assert measured["compared"] == (4 * 40 if "kernel" in functions else 0)  # groups have no integer product
    for function in functions:
        assert measured[function]["microseconds"] > 0
        assert measured[function]["error"] < 2**-7
        assert measured[function]["speedup"] == pytest.approx(
            row["bf16"]["microseconds"] / measured[function]["microseconds"], abs=1e-3
        )
    assert row["int8"]["microseconds"] > 0
    assert list(result["quantizers"]["4x96"]) == ["copy", quantizer]
    assert all(figures["terabytes_per_second"] >= 0 for figures in result["quantizers"]["4x96"].values())


@pytest.mark.parametrize("w_bits", [3, 8])
@pytest.mark.covered("checks, by the test below; the kernel, by kernels/sm90/gemm")
def test_int8_kernels_pass_their_check(w_bits):
    """Weights expand to values, and at 8 bits to codes."""
    shape = Shape("s", 70, 40, 100)
    product, operands = Product(shape, BipolarFormat(8), BipolarFormat(w_bits), "sm90"), Operands(shape, 0)
    assert product.kind == "int8"
    with interpreted(InterpretGPUParams()):
        function, args = product.kernel(operands)
        output = jax.jit(function)(*args)
    assert product.check_kernel(operands, output) < 2**-7
    with pytest.raises(ValueError, match="an error exceeds rounding"):
        product.check_kernel(operands, output * 1.01)


def test_integer_groups_are_prepared_and_pass_their_checks():
    shape = Shape("s", 3, 40, 96)
    (product,), operands = parse_products(shape, "W4A8g32", "sm90").values(), Operands(shape, 0)
    assert (product.kind, product.has_integers) == ("int8", True)
    (by_xla,) = parse_products(shape, "W4A8g32", "xla").values()
    assert by_xla.check_integers(operands, jax.jit(by_xla.integers(operands)[0])) == 3 * 40
    with interpreted(InterpretGPUParams()), optimizations(False):
        function, args = product.product(operands)
        output = jax.jit(function)(*args)
    assert product.check_operation(operands, output) < 2**-7
    with pytest.raises(ValueError, match="an error exceeds rounding"):
        product.check_operation(operands, output * 1.1)


def test_on_other_backends_only_the_operation_is_timed(xla_run):
    for row in result_of(xla_run)["shapes"].values():
        for measured in row["precisions"].values():
            assert measured["kernel"] is None
            assert measured["operation"]["microseconds"] > 0
        assert row["peers"] == {"humming": {"error": "torch is not installed"}}


def test_plots_are_pngs(xla_run):
    for name in ("speedup.png", "roofline.png"):
        assert (xla_run / name).read_bytes().startswith(PNG_SIGNATURE)


def test_a_stopped_run_resumes_and_retries_failures(tmp_path, monkeypatch):
    original = Product.check_integers

    def broken(self, *args):
        if self.a_format.bits == 2:
            raise ValueError("planted\nfailure")
        return original(self, *args)

    monkeypatch.setattr(Product, "check_integers", broken)
    matmul.main(bench(precisions="W1A1,W1A2"), tmp_path)
    precisions = result_of(tmp_path)["shapes"]["24x40x96"]["precisions"]
    assert precisions["W1A2"] == {"error": "ValueError: planted"}
    assert "operation" in precisions["W1A1"]
    monkeypatch.undo()
    checked = []
    monkeypatch.setattr(Product, "check_integers", lambda self, *a: checked.append(self.a_format) or original(self, *a))
    matmul.main(bench(precisions="W1A1,W1A2"), tmp_path)
    assert checked == [BipolarFormat(2)]
    again = result_of(tmp_path)["shapes"]["24x40x96"]["precisions"]
    assert again["W1A1"] == precisions["W1A1"]
    assert "operation" in again["W1A2"]
    with pytest.raises(ValueError, match="seed: stored 0, now 1"):
        matmul.main(bench(seed=1), tmp_path)


def test_wrong_integers_are_an_error_without_a_timing(tmp_path, monkeypatch):
    monkeypatch.setattr(Operands, "exact_integers", lambda self, *_: np.zeros((24, 40), np.int64))
    matmul.main(bench(precisions="W1A1"), tmp_path)
    row = result_of(tmp_path)["shapes"]["24x40x96"]["precisions"]["W1A1"]
    assert list(row) == ["error"]
    assert row["error"].startswith("ValueError: wrong integers")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"implementation": "cuda"}, "implementation must be one of"),
        ({"implementation": "sm90"}, "nothing to measure: its kernels need an NVIDIA GPU"),
        ({"peers": "torch,cutlass"}, "config.peers names cutlass: choose from torch, gemlite, humming"),
        ({"precisions": "int4"}, "is not of the form"),
    ],
)
def test_bad_input_is_rejected_before_measuring(tmp_path, fields, message):
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
    """Products of values decoded from the planes, in NumPy."""

    error = 0

    @classmethod
    def integer_matmul(cls, codes, w, a_format):
        bits = np.unpackbits(w.planes.view(np.uint8), axis=-1, count=codes.shape[1], bitorder="little").astype(int)
        w_values = 2 * np.tensordot(w.format.plane_weights, bits, axes=1) - w.format.max_value
        np.testing.assert_array_equal(w.row_sums[:, 0] * 2, (w_values + w.format.max_value).sum(axis=1))
        return ((2 * codes.astype(int) - a_format.max_value) @ w_values.T + cls.error)[..., None]


def test_ragged_sizes_are_not_multiples_of_8():
    rng = np.random.default_rng(0)
    sizes = [exactness._ragged_sizes(rng, 700, few_tokens=False) for _ in range(50)]
    assert all(size % 8 for shape in sizes for size in shape)
    assert max(map(max, sizes)) <= 701
    few = [exactness._ragged_sizes(rng, 700, few_tokens=True) for _ in range(50)]
    tokens = {m for m, _, _ in few}
    assert tokens <= set(range(1, 65))
    assert min(tokens) <= 8
    assert max(tokens) > 56  # several launches where they have many planes
    assert max(map(max, few)) > 600
