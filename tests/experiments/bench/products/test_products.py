"""Shapes, timing, operands and checks of the matmul experiments."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax import TERNARY, BipolarFormat
from experiments.bench.products.operands import Operands, check_integers, check_output
from experiments.bench.products.product import Ceilings, Product, parse_products
from experiments.bench.products.shapes import MODELS, SQUARES, Shape, parse_shapes
from experiments.support import timing

# Shapes and precisions.


def test_shapes_of_models_are_their_layers():
    down = Shape("llama2-7b/down@2048", 2048, 4096, 11008)
    assert parse_shapes("llama2-7b/down@2048") == [down]
    assert down in parse_shapes("llama2-7b@2048")
    assert [len(parse_shapes(f"{model}@7")) for model in MODELS] == [4, 4, 4]
    assert {(s.n, s.k) for s in parse_shapes("opt-6.7b@1")} == {
        (12288, 4096),
        (4096, 4096),
        (16384, 4096),
        (4096, 16384),
    }


def test_lists_of_shapes_have_no_duplicates():
    assert parse_shapes("squares") == list(SQUARES)
    assert [str(shape) for shape in SQUARES[-2:]] == ["8192x8192x8192", "8192x8192x16384"]
    assert [shape.name for shape in parse_shapes("4096, 4096x4096x4096,1x2x3")] == ["4096x4096x4096", "1x2x3"]
    assert len(parse_shapes("all")) == len(SQUARES) + 3 * 4 * 3
    assert Shape("s", 2, 3, 5).operations == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4096x2", "shape '4096x2' is not one of"),
        ("0", "has a size of zero"),
        ("gpt-9@16", "unknown model 'gpt-9': choose from llama2-7b"),
        ("llama2-7b/fc1@16", "llama2-7b has no layer 'fc1': it has qkv, o, gate_up, down"),
    ],
)
def test_unknown_shapes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shapes(text)


def test_precisions():
    shape = Shape("s", 8, 8, 1024)
    assert len(parse_products(shape, "all", "sm90")) == 64
    products = parse_products(shape, "W1.58A8, W1.58A8,W4A8g64,W4A8g64f,W2A4s", "xla")
    assert products == {
        "W1.58A8": Product(shape, BipolarFormat(8), TERNARY, "xla"),
        "W4A8g64": Product(shape, BipolarFormat(8), BipolarFormat(4), "xla", group_size=64, integer_groups=True),
        "W4A8g64f": Product(shape, BipolarFormat(8), BipolarFormat(4), "xla", group_size=64),
        "W2A4s": Product(shape, BipolarFormat(4, symmetric=True), BipolarFormat(2), "xla"),
    }
    operands = Operands(shape, 0)
    function, (x, w) = products["W2A4s"].operation(operands)
    np.testing.assert_array_equal(function(x, w), bj.matmul(x, w, BipolarFormat(4, symmetric=True)))
    with pytest.raises(ValueError, match="'W4A16' has float activations"):
        parse_products(shape, "W4A16", "xla")


# Timing.


def test_a_timing_has_the_median_and_the_quartiles():
    assert timing.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0], "wall") == timing.Timing(3.0, 2.0, 4.0, 5, "wall")
    assert timing.Timing.of([7.0], "wall") == timing.Timing(7.0, 7.0, 7.0, 1, "wall")
    measured = timing.measure(jax.jit(jnp.sin), jnp.ones(3), iterations=4)
    assert measured.iterations == 4
    assert 0 < measured.low <= measured.median <= measured.high


@pytest.mark.parametrize("iterations", [1, 3])
def test_on_a_gpu_kernels_are_timed(monkeypatch, iterations):
    def profiled(function, *, iterations):
        times = [0.25] * iterations
        return lambda *args: (function(*args), times[0] if iterations == 1 else times)

    measure = "jax.experimental.mosaic.gpu.profiler.measure"
    monkeypatch.setattr(timing.jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(measure, profiled)
    measured = timing.measure(lambda: 0, iterations=iterations)
    assert measured == timing.Timing(250.0, 250.0, 250.0, iterations, "device")
    monkeypatch.setattr(measure, lambda function, *, iterations: lambda *args: (0, None))
    with pytest.raises(RuntimeError, match="no kernel ran"):
        timing.measure(lambda: 0, iterations=iterations)


def test_errors_of_compilation_are_returned():
    def wrong(x):
        raise NotImplementedError("not here\nat all")

    compiled = timing.compile_all({"wrong": (wrong, (1.0,)), "right": (jnp.sin, (0.0,))}, threads=2)
    assert timing.one_line(compiled["wrong"]) == "NotImplementedError: not here"
    assert compiled["right"](0.0) == 0


# Operands and checks.


@pytest.mark.parametrize("w_format", [BipolarFormat(3), TERNARY], ids=lambda fmt: f"W{fmt.name}")
def test_operands_have_the_documented_layout(w_format):
    operands = Operands(Shape("s", 70, 90, 45), seed=1)
    w, a_format = operands.weights(w_format), BipolarFormat(2)
    w.check()
    assert w.codes().max() == w_format.max_value
    np.testing.assert_array_equal(w.row_sums[:, 0], jnp.sum(w.codes(), axis=-1, dtype=jnp.int32))
    sums = operands.tokens(a_format).code_sums
    assert sums.shape == (72,)  # padded as by the quantizer
    np.testing.assert_array_equal(sums[:70], jnp.sum(operands.codes(a_format), axis=-1, dtype=jnp.int32))
    product = a_format.values(operands.codes(a_format)) @ w.values()
    check_integers(operands.sampled(product), operands.exact_integers(a_format, w_format))


def test_checks_find_errors():
    expected = np.array([[3, 5], [7, 9]])
    with pytest.raises(ValueError, match="1 of 4 compared differ, the first is 6, not 5"):
        check_integers(np.array([[3, 6], [7, 9]]), expected)
    with pytest.raises(ValueError, match="not all numbers are finite"):
        check_output(jnp.array([jnp.nan]), expected, expected)
    with pytest.raises(ValueError, match="an error exceeds rounding"):
        check_output(jnp.ones(1), expected * (1 + 2.0**-7), expected)
    assert check_output(jnp.ones(1), expected * (1 + 2.0**-9), expected) == pytest.approx(2.0**-9)


def test_the_roofline_is_the_larger_of_compute_and_memory_time():
    ceilings = Ceilings(binary=2e6, int8=1e6, bf16=1e6, bandwidth=1e6)
    product = Product(Shape("s", 8, 8, 1024), BipolarFormat(2), BipolarFormat(3), "sm90")
    assert product.kernel_bytes == 8 * 1024 * 5 // 8 + 2 * 64
    assert ceilings.compute_microseconds(product) == pytest.approx(2 * 8 * 8 * 1024 * 6 / 2)
    assert ceilings.roofline_microseconds(product) == ceilings.compute_microseconds(product)
    assert Ceilings(1e30, 1, 1, 1.0).roofline_microseconds(product) == pytest.approx(1e6 * product.kernel_bytes)


def test_returned_errors_are_raised_on_use():
    assert timing.raise_if_error(3) == 3
    with pytest.raises(KeyError):
        timing.raise_if_error(KeyError("x"))
