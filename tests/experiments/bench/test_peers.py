"""experiments/bench/peers: weights that other libraries share, and a library that is not installed here, planted."""

from __future__ import annotations

import contextlib
import sys
import types

import numpy as np
import pytest

from bipolar_jax import Precision
from configs.bench import matmul as bench_config
from experiments.bench.peers import products
from experiments.bench.peers.products import measure_peers, parse_peer_precisions
from experiments.bench.peers.shared_weights import SharedProduct
from experiments.bench.products.shapes import Shape
from experiments.support.timing import Timing

SHAPE = Shape("s", 3, 40, 96)


def numbers(shared: SharedProduct) -> np.ndarray:
    group_size = shared.precision.group_size or SHAPE.k
    scales = np.repeat(shared.group_scales.astype(np.float64), group_size, axis=1)
    return scales * (shared.codes.astype(np.float64) - (1 << (shared.precision.w_bits - 1)))


@pytest.mark.parametrize("text", ["W8A8", "W1A8g32", "W4A16g32"])
@pytest.mark.sample(1)
def test_ours_are_the_same_weights_and_pass_the_check(text):
    shared = SharedProduct.random(SHAPE, Precision.parse(text), seed=0)
    np.testing.assert_array_equal(np.asarray(shared.ours().dequantize(), np.float64), numbers(shared).T)
    figures = shared.measure_ours(1)
    assert figures["microseconds"] > 0
    exact = shared.x.astype(np.float64) @ numbers(shared).T
    assert shared.check(exact) == 0
    with pytest.raises(ValueError, match=r"wrong output: its error is 10.00% of the exact product"):
        shared.check(1.1 * exact)


@pytest.mark.parametrize("text", ["W1.58A8", "W4A4", "W8A8g128f"])
def test_what_peers_do_not_have_is_an_error(text):
    with pytest.raises(ValueError, match=r"(peers have no|no integer groups)"):
        parse_peer_precisions(f"W4A8,{text}")


class Tensor:
    """What `products.py` asks of torch's tensors."""

    def __init__(self, values):
        self.values = np.asarray(values, np.float32)

    def to(self, device, dtype):
        return self

    def float(self):
        return self

    cpu = clone = float

    def numpy(self):
        return self.values


class Layer:
    """A Humming layer in NumPy; `wrong` scales its products."""

    wrong = 1.0

    def __init__(self, *, shape_n, shape_k, weight_config, input_config, torch_dtype):
        self.bits, self.group_size = int(weight_config["dtype"][3:]), weight_config.get("group_size", shape_k)
        assert input_config in (None, {"dtype": "int8"})

    def cuda(self):
        return self

    def load_from_tensors(self, tensors):
        scale = np.repeat(tensors["weight_scale"].values, self.group_size, axis=1)
        self.weight = scale * (tensors["weight"].values - (1 << (self.bits - 1)))

    def transform(self):
        pass

    def __call__(self, x):
        return Tensor(self.wrong * x.values @ self.weight.T)


@pytest.fixture
def humming(monkeypatch):
    """torch and humming of the above, and a clock that calls every function once."""
    torch = types.ModuleType("torch")
    torch.from_numpy, torch.bfloat16, torch.int32 = Tensor, "bfloat16", "int32"
    package, layer = types.ModuleType("humming"), types.ModuleType("humming.layer")
    package.ops = types.SimpleNamespace(pack_weight=lambda codes, bits: codes)
    layer.HummingLayer = Layer
    for name, module in {"torch": torch, "humming": package, "humming.layer": layer}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(products, "_check_gpu", contextlib.nullcontext)
    timed = []

    def clock(calls, iterations):
        timed.append(len([call() for call in calls]))
        return Timing.of([1.0], "none")

    monkeypatch.setattr(products, "_cuda_microseconds", clock)
    return timed


def test_a_peer_is_checked_and_timed_beside_ours(humming, monkeypatch):
    config, row = bench_config.get_config(), {"peers": {}}
    config.iterations = 1
    precisions = parse_peer_precisions("W4A8,W4A16g32")
    measure_peers(["humming"], precisions, SHAPE, row, config)
    assert list(row["peers"]) == ["humming W4A8", "humming W4A16g32"]
    for figures in row["peers"].values():
        assert figures["error_norm"] < 1e-5
        assert figures["ours"]["error_norm"] < 0.01
        assert figures["ours"]["implementation"] == "xla"
    assert humming == [12, 12]  # copies: of few tokens, weights come from memory
    measure_peers(["humming"], precisions, SHAPE, row, config)
    assert len(humming) == 2  # nothing is timed twice
    monkeypatch.setattr(SharedProduct, "measure_ours", lambda *_: 1 / 0)
    measure_peers(["humming"], parse_peer_precisions("W1A8"), SHAPE, row, config)
    assert row["peers"]["humming W1A8"]["ours"] == {"error": "ZeroDivisionError: division by zero"}
    assert row["peers"]["humming W1A8"]["microseconds"] == 1.0
    monkeypatch.setattr(Layer, "wrong", 1.1)
    measure_peers(["humming"], parse_peer_precisions("W2A8g32"), SHAPE, row, config)
    assert row["peers"]["humming W2A8g32"]["error"].startswith("ValueError: wrong output: its error is 10.00%")
