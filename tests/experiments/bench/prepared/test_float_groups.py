"""experiments/bench/prepared/float_groups.py on tiny shapes and interpreted kernels."""

from __future__ import annotations

import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.execution import interpreted
from experiments.bench.prepared import float_groups
from experiments.bench.products.expanded import Weights
from experiments.bench.products.operands import Operands
from experiments.bench.products.shapes import Shape

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


def test_precisions_are_read():
    assert float_groups.parse("4g32zeros") == (Weights(4, 32), "zeros")
    assert float_groups.parse("W4A8g128f") == (Weights(4, 128), "offsets")
    with pytest.raises(ValueError, match="such as 4g128zeros, or W4A8g128f; got '4g128'"):
        float_groups.parse("4g128")


def test_prompts_are_timed_in_every_way():
    operands = Operands(Shape("tiny", 70, 64, 256), seed=0)
    with interpreted(plgpu.InterpretGPUParams()):
        long, short = (float_groups.product_of(operands, *float_groups.parse(f"4g{g}zeros"))[0] for g in (128, 32))
        floats = [f"float16, {name}" for name in float_groups.FLOAT_TILINGS]
        assert list(float_groups.other_ways(long)) == [*float_groups.TILINGS, *floats]
        of_64_tokens = [name for name, (tiling, _) in float_groups.TILINGS.items() if tiling.tile_m == 64]
        assert list(float_groups.other_ways(short)) == [*of_64_tokens, *floats]


@pytest.mark.parametrize(("m", "kind"), [(3, "offsets"), (70, "zeros"), (2, "scales")])
@pytest.mark.sample(1)
def test_products_are_checked(m, kind):
    operands = Operands(Shape("tiny", m, 64, 96), seed=0)
    with interpreted(plgpu.InterpretGPUParams()):
        (product, args), exact = float_groups.product_of(operands, Weights.parse("4g32"), kind)
        found = product(*args)
    float_groups.check(found, exact, operands)
    with pytest.raises(ValueError, match="sampled numbers are wrong"):
        float_groups.check(found, exact + np.abs(exact).mean(), operands)
