"""Float activations times packed weights, against the dequantized weights in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from bipolar_jax import BipolarFormat
from bipolar_jax.ops.dispatch import BACKENDS
from tests.gpu.cases.operands import assert_within, generator, numbers_of, random_weights, rounding
from tests.gpu.trial import Case, Trial, one_program
from tests.support.integer_products import W_FORMATS

SM90 = BACKENDS["sm90"]

_TOKENS = (1, 2, 8, 9, 16, 32, 33, 64)
_GROUP_SIZES = (None, 128, 64, 32, 256)
_DTYPES = (ml_dtypes.bfloat16, np.float16)
_CASES_A_FORMAT = 4  # for each dtype


def cases() -> list[Case]:
    rng, chosen = generator(1), []
    for index in range(_CASES_A_FORMAT):
        for number, (w_format, dtype) in enumerate((fmt, dtype) for fmt in W_FORMATS for dtype in _DTYPES):
            group_size = _GROUP_SIZES[(index + number) % len(_GROUP_SIZES)]
            m = _TOKENS[rng.integers(len(_TOKENS))]
            n, k = int(rng.integers(1, 300)), int(rng.integers(1, 4500))
            chosen.append(
                _case(w_format, dtype, m, n, max(k, (group_size or 0) + 1), group_size, bool(rng.integers(2)))
            )
    return chosen


def small() -> dict[str, Case]:
    return {"weight-only": _case(BipolarFormat(4), ml_dtypes.bfloat16, 3, 67, 1100, 128, True)}


def _case(w_format: BipolarFormat, dtype, m: int, n: int, k: int, group_size: int | None, offsets: bool) -> Case:
    def make() -> Trial:
        rng = generator(m, n, k)
        w = random_weights(rng, n, k, w_format, group_size, offsets)
        x, bias = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=n).astype(np.float32)
        wide, (w_hat, w_size) = x.astype(np.float64), numbers_of(w)
        expected = wide @ w_hat + bias
        # Weights are exact in both dtypes; sums of k products in float32, one rounding of the output.
        tolerance = rounding(dtype, expected) + 2.0**-19 * (np.abs(wide) @ w_size + np.abs(bias))

        def check(y):
            if y.dtype != dtype:
                raise AssertionError(f"dtype {y.dtype}, expected {np.dtype(dtype)}")
            assert_within(y, expected, tolerance)

        return one_program(SM90.weight_only_matmul, (x, w, bias), check)

    group = "" if group_size is None else f"g{group_size}"
    return Case(f"W{w_format.name}A16{group} {m}x{n}x{k} {np.dtype(dtype).name}{' offsets' * offsets}", make)
