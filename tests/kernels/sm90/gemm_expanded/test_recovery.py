"""Sums of expanded bytes are completed to the product of values, exactly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.kernels.sm90.gemm_expanded.recovery import ExpandedRecovery
from tests.packing.integer_groups import random_groups
from tests.support.integer_products import A_FORMATS, codes_with_extremes

K = 200


def completed(recovery: ExpandedRecovery, x, expanded, column_sums, zero_code) -> np.ndarray:
    """The epilogue's formula in int64; T as the tensor cores sum it."""
    sums = (x.astype(np.int64) - recovery.a_format.code_offset) @ expanded.astype(np.int64).T
    row_term = recovery.row_term(x.sum(1, dtype=np.int64))
    return (
        sums * recovery.product_weight
        + row_term[:, None]
        + recovery.column_weight(zero_code)[:, None] * recovery.column_value_sums(column_sums)
    )


@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("w_format", [*map(BipolarFormat, range(1, 9)), TERNARY], ids=lambda fmt: f"W{fmt.name}")
def test_sums_are_completed(w_format, with_zero):
    for a_format in A_FORMATS:
        x = codes_with_extremes(a_format, 5, K, 0)
        zero_code = np.random.default_rng(1).integers(0, a_format.max_value + 1, 5)
        # With a zero code the sum is of u - z, half of the distance of values.
        tokens = x.astype(np.int64) - zero_code[:, None] if with_zero else 2 * x.astype(np.int64) - a_format.max_value
        codes = codes_with_extremes(w_format, 7, K, 2)
        plain = ExpandedRecovery("int8", a_format, w_format, K, with_zero)
        found = completed(plain, x, codes, codes.sum(1, dtype=np.int64), zero_code)
        np.testing.assert_array_equal(found, tokens @ (2 * codes.astype(np.int64) - w_format.max_value).T)
        if w_format.bits > 6:
            continue
        groups = random_groups(w_format, 7, K, 64)
        grouped = ExpandedRecovery("int8", a_format, w_format, K, with_zero, grouped=True)
        found = completed(grouped, x, groups.values + 128, groups.values.sum(1), zero_code)
        np.testing.assert_array_equal(found, tokens @ groups.values.T)


def test_longer_sums_than_int32_holds_are_known():
    """At 8 bits 128 * 255 * K for integer groups, and 255 * 255 * K for plain codes."""
    recovery = ExpandedRecovery("int8", BipolarFormat(8), BipolarFormat(8), 4096, True)
    assert recovery.most_elements == 33_025
    assert dataclasses.replace(recovery, grouped=True).most_elements == 65_793


def test_float32_is_used_where_it_is_exact():
    short = ExpandedRecovery("int8", BipolarFormat(1), BipolarFormat(2), 256, False, grouped=True)
    assert short.fits_float32
    assert not ExpandedRecovery("int8", BipolarFormat(8), BipolarFormat(2), 4096, True, grouped=True).fits_float32
