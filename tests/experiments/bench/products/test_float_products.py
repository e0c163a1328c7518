"""experiments/bench/products/float_products.py on tiny shapes and interpreted kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from experiments.bench.products import float_products
from experiments.bench.products.expanded import Weights
from experiments.bench.products.operands import Operands
from experiments.bench.products.shapes import Shape

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


@pytest.mark.parametrize("m", [3, 65])
@pytest.mark.sample(1)
def test_products_pass_the_check(m):
    operands = Operands(Shape(f"{m}x40x96", m, 40, 96), seed=0)
    w, exact, sizes = float_products.weights_of(operands, Weights.parse("2g32"))
    with interpreted(InterpretGPUParams()):
        todo = float_products.calls(operands, w)
        assert list(todo) == ["prepared", *float_products.PARTS, "XLA"][: 1 if m == 3 else None]
        for name, (product, args) in todo.items():
            if name not in float_products.PARTS:
                float_products.check(jax.jit(product)(*args), exact, sizes, operands)


def test_tilings_of_few_tokens_begin_with_the_chosen_one():
    shape = Shape("16x4096x14336", 16, 4096, 14336)
    w = jax.eval_shape(lambda: bj.quantize(jnp.zeros((14336, 4096)), 4, 0, 128, scales="integer").prepare())
    tilings = list(float_products.tilings_of_few_tokens(shape, w).values())
    assert tilings[0] == few_tokens_tiling(16, 4096, 14336, 4, 1, rows_of_stage=2)
    divisions = [(tiling.parts, tiling.cluster) for tiling in tilings]
    assert len(set(divisions)) == len(divisions) > 5
