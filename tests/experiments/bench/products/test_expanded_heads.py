"""experiments/bench/products/expanded_heads.py on tiny prompts: what is timed is traced, and wrong heads are found."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax.kernels.sm90.core.execution import interpreted
from experiments.bench.products import expanded_heads
from experiments.bench.products.expanded import Weights
from experiments.bench.products.expanded_heads import Model, calls, check

MODEL = Model(tokens=70, hidden=96, queries=2, keys=1, size=64)


def test_all_calls_are_the_projection_of_the_model(monkeypatch):
    monkeypatch.setattr(expanded_heads, "EXPANDED_TILINGS", expanded_heads.EXPANDED_TILINGS[:1])
    with interpreted(InterpretGPUParams()):
        shapes = {name: jax.eval_shape(*_flat(call)) for name, call in calls(MODEL, Weights.parse("2g32")).items()}
    heads = [(1, 70, count, 64) for count in (2, 1, 1)]
    for name, found in shapes.items():
        if name.startswith("matrix"):
            assert found.shape == (70, 4 * 64)
        else:
            assert [array.shape for array in found[:3]] == heads
    assert len(shapes) == 4


def _flat(call):
    function, args = call
    return function, *args


def test_wrong_heads_are_found():
    rng = np.random.default_rng(0)
    q, k, v = expected = [rng.normal(size=(1, 70, count, 64)).astype(np.float32) for count in (2, 1, 1)]
    keys, values = (heads.swapaxes(1, 2)[None].copy() for heads in (k, v))
    check((q, k, v, keys, values), expected)
    values[0, 0, 0, 69, 63] += 1
    with pytest.raises(ValueError, match=r"values differ by 0.\d* of the largest"):
        check((q, k, v, keys, values), expected)
