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
