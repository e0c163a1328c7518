"""experiments/bench/products/expanded.py on a tiny shape and the interpreted kernel."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax.kernels.sm90.core.execution import interpreted
from experiments.bench.products import expanded
from experiments.bench.products.expanded import Weights
from experiments.bench.products.operands import Operands
from experiments.bench.products.shapes import Shape

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


@pytest.fixture(scope="module")
def operands():
    return Operands(Shape("70x130x96", 70, 130, 96), seed=0)


def test_a_right_product_passes_the_check_and_a_wrong_one_does_not(operands):
    with interpreted(InterpretGPUParams()):
        todo, exact = expanded.calls(operands, Weights.parse("2g32"))
        assert list(todo) == list(expanded.TILINGS)
        multiply, args = next(iter(todo.values()))
        product = np.asarray(multiply(*args), np.float64)
    expanded.check(product, exact, operands)
    product[operands.rows[0], operands.columns[0]] += 1
    with pytest.raises(ValueError, match="1 of 4096 sampled numbers are wrong"):
        expanded.check(product, exact, operands)


def test_baselines_are_products_of_the_shape(operands):
    with interpreted(InterpretGPUParams()):
        calls = expanded.baselines(operands)
        for name in ("gemm", "bf16"):
            function, args = calls[name]
            assert jax.eval_shape(function, *args).shape == (70, 130)


def test_precisions_are_read():
    assert Weights.parse("4g128") == Weights(4, 128)
    assert Weights.parse("8") == Weights(8, None)
