"""experiments/bench/language_models/decode_attention.py on tiny caches and the interpreted kernel."""

from __future__ import annotations

import numpy as np
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax.kernels.sm90.core.execution import interpreted
from experiments.bench.language_models import decode_attention

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


@pytest.mark.covered("kernels/sm90/decode_attention")
def test_divisions_agree():
    args = decode_attention.operands(2, 70, layers=1, heads=2, kv_heads=1)
    with interpreted(InterpretGPUParams()):
        whole, *others = (
            np.asarray(decode_attention.attend(*args, division=each), np.float32)
            for each in ((1, 1, 1), (2, 1, 2), (1, 2, 2))
        )
    assert whole.shape == (1, 2, 2, decode_attention.HEAD_DIM)
    for context in others:
        decode_attention.check(context, whole, (0, 0, 0))
    with pytest.raises(ValueError, match="differs by 2 of the largest number"):
        decode_attention.check(-whole, whole, (2, 1, 1))


def test_the_chosen_division_comes_first():
    assert decode_attention.divisions(64, 320)[0] == (1, 4, 2)
    expected = [(1, 1, 2), (1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 2)]
    assert decode_attention.divisions(16, 512) == expected
