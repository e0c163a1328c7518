"""experiments/bench/products/few_tokens.py on a tiny shape and the interpreted kernel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax import quantize
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.prepared_few_tokens.tilings import few_tokens_tiling
from experiments.bench.products import few_tokens
from experiments.bench.products.cold_weights import with_cold_weights
from experiments.bench.products.expanded import Weights, check
from experiments.bench.products.operands import Operands
from experiments.bench.products.shapes import Shape, parse_shapes

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


def test_the_product_passes_the_check():
    operands = Operands(Shape("3x40x96", 3, 40, 96), seed=0)
    with interpreted(InterpretGPUParams()):
        args, tilings, exact = few_tokens.product_of(operands, Weights.parse("2g32"))
        tiling = dataclasses.replace(next(iter(tilings.values())), warpgroups=1)
        product, args = few_tokens.call(args, tiling)
        check(product(*args), exact, operands)
        (products, copies), count = with_cold_weights((product, args), few_tokens._WEIGHTS, 10**9)
        assert count == len(jax.eval_shape(products, *copies)) == 12


def test_tiles_of_64_tokens_are_timed_beside_many():
    w = jax.eval_shape(lambda: quantize(jnp.zeros((14336, 4096)), 4, 0, group_size=128, scales="integer").prepare())
    assert few_tokens.expanded_tilings(Shape("16x4096x14336", 16, 4096, 14336), w) == {}
    tilings = few_tokens.expanded_tilings(Shape("64x4096x14336", 64, 4096, 14336), w).values()
    assert {tiling.schedule for tiling in tilings} == {"split_n", "alternate"}
    assert {tiling.splits > 1 for tiling in tilings} == {False, True}


def test_the_chosen_tiling_comes_first():
    for shape in parse_shapes(few_tokens.SHAPES):
        tilings = list(few_tokens.tilings_of(shape, 4, 1).values())
        assert tilings[0] == few_tokens_tiling(shape.m, shape.n, shape.k, 4, 1)
        assert len(set(tilings)) == len(tilings) >= 3
