"""Accuracy of the float arithmetic around the exact integer products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.kernels.semantics import epilogue
from bipolar_jax.models.inference.sampling import Sampling, sample
from tests.support.backends import PORTABLE

every_backend = pytest.mark.parametrize("implementation", list(PORTABLE))
rng = np.random.default_rng(0)


def test_the_difference_of_large_integers_is_rounded_once():
    """Both are near 2^31, so rounding them to float32 before the subtraction would lose the difference."""
    a = np.array([2**31 - 1, -(2**31) + 1, 2**31 - 3, 7, -(2**31) + 1], np.int64)
    b = np.array([2**31 - 2, -(2**31) + 4, -(2**31) + 2, -8, 2**31 - 1], np.int64)
    found = epilogue._difference(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))
    np.testing.assert_array_equal(found, (a - b).astype(np.float32))


@every_backend
def test_products_of_weights_with_a_large_mean_are_accurate(implementation):
    """With one activation that is not zero the product is a small difference of large integers."""
    k = 30000
    w = bj.quantize(rng.uniform(0.5, 1.0, (k, 2)).astype(np.float32), 8, 0)
    x = np.zeros((1, k), np.float32)
    x[0, 3] = 1.0
    expected = np.asarray(w.dequantize(), np.float64)[3]
    found = bj.matmul(x, w, 8, implementation=implementation)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@every_backend
@pytest.mark.parametrize("size", [1e-6, 2e-8, 7e4])
def test_weight_only_float16_does_not_round_the_weights(implementation, size):
    """The weights would be subnormal in float16, or overflow."""
    w = bj.quantize((rng.standard_normal((128, 8)) * size).astype(np.float32), 8, 0, group_size=64)
    x = rng.standard_normal((4, 128)).astype(np.float16) / (1 if size < 1 else 8192)
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    found = np.asarray(bj.matmul(x, w, None, implementation=implementation), np.float64)
    # Rounding the result to float16 costs at most 2^-11 of it, or half of the smallest subnormal, 2^-25.
    np.testing.assert_allclose(found, exact, rtol=2**-10, atol=2**-24)


@every_backend
def test_weight_only_overflows_only_if_its_result_does(implementation):
    w = bj.quantize(np.full((4, 1), 1e-30, np.float32), 8, 0)
    found = bj.matmul(np.full((1, 4), 1e37, np.float32), w, None, implementation=implementation)
    np.testing.assert_allclose(found, [[4e7]], rtol=1e-5)


def test_quantize_passes_no_gradient_through_its_scales():
    x = rng.standard_normal((3, 8)).astype(np.float32)
    kernel = rng.standard_normal((8, 2)).astype(np.float32)
    gradient = jax.grad(lambda kernel: bj.matmul(x, bj.quantize(kernel, 4, 0), 8).sum())(kernel)
    np.testing.assert_array_equal(gradient, np.zeros_like(kernel))


def test_traced_codes_out_of_range_give_nan():
    codes = np.array([[7, 0], [1, 2]])
    w = jax.jit(lambda codes: bj.from_codes(codes, 2, -2, np.ones((2, 1), np.float32)))(codes)
    product = bj.matmul(np.ones((1, 2), np.float32), w, 8)
    assert np.isnan(product[0, 0])  # the output channel with code 7
    assert np.isfinite(product[0, 1])


def test_sampling_at_a_tiny_temperature_does_not_overflow():
    sampling = Sampling(temperature=1e-6)
    assert sample(jnp.array([[1.0, 5.0, 9.0]]), sampling, jax.random.key(0))[0] == 2
