"""Fixed-point sums: close to the exact sums, and equal to the bit in any order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.quantize.fixed_point import fixed_point_mean, fixed_point_sum, sums_with_values


def rows(n, seed=0):
    """61 rows of n normal numbers, each row times its own power of ten from 1e-30 to 1e29."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(61, n)) * 10.0 ** rng.integers(-30, 30, size=(61, 1))).astype(np.float32)


@pytest.mark.parametrize("n", [1, 3, 64, 4096, 16384])
def test_sums_are_close_and_do_not_depend_on_the_order(n):
    x = np.abs(rows(n))
    exact = x.astype(np.float64).sum(axis=-1)
    found = np.asarray(fixed_point_sum(x))
    np.testing.assert_allclose(found, exact, rtol=2e-7)
    rng = np.random.default_rng(1)
    order = np.concatenate([start + rng.permutation(min(n, 4096)) for start in range(0, n, 4096)])  # within chunks
    np.testing.assert_array_equal(found, jax.jit(fixed_point_sum)(x[:, order]))


@pytest.mark.parametrize(
    ("size", "number", "outlier"),
    [
        (16384, 1.0, 2.0**17),
        (8192, 0.3, 2000.0),
        (14336, 1.7, 3e4),
        (16384, 1.00003, 1.00003),
        (4096, 1.9999999, 3.9999998),
        (4097, 3.9999998, 1.9999999),
        (65536, 0.1, 1e6),
    ],
)
@pytest.mark.sample(2)
def test_small_numbers_beside_an_outlier_are_not_lost(size, number, outlier):
    x = np.full((2, size), number, np.float32)
    x[0, 77], x[1, 77] = outlier, -outlier
    exact = x.astype(np.float64).sum(axis=-1)
    np.testing.assert_allclose(fixed_point_sum(x), exact, rtol=0, atol=3e-7 * np.abs(x).astype(np.float64).sum(-1)[0])


def test_the_mean_of_an_empty_row_is_zero():
    np.testing.assert_array_equal(fixed_point_mean(jnp.zeros((3, 0))), np.zeros(3))


def test_cancellation_zeros_and_subnormals():
    x = np.asarray([[3e38, -3e38, 1e38], [0.0, -0.0, 0.0], [1e-45, 0.0, 0.0]], np.float32)
    # Subnormal numbers may be flushed to zero.
    np.testing.assert_array_equal(np.asarray(fixed_point_sum(x))[:2], np.asarray([1e38, 0], np.float32))
    assert 0 <= float(fixed_point_sum(x)[2]) <= 1e-44


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_make_their_row_nan(bad):
    x = rows(4096)
    x[7, 1234] = bad
    found = np.asarray(jax.jit(fixed_point_sum)(x))
    assert np.isnan(found[7])
    assert np.isfinite(np.delete(found, 7)).all()


def test_means_and_their_gradient():
    x = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    np.testing.assert_allclose(fixed_point_mean(x), x.mean(axis=-1), rtol=1e-5, atol=1e-7)
    gradient = jax.grad(lambda x: jnp.sum(fixed_point_mean(x) ** 2))(x)
    np.testing.assert_allclose(
        gradient, np.repeat(2 / 24 * x.mean(axis=-1, keepdims=True), 24, 1), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(
        jax.vmap(fixed_point_sum)(x.astype(jnp.bfloat16)), fixed_point_sum(x.astype(jnp.bfloat16))
    )


@pytest.mark.parametrize("n", [1, 576, 4096, 4097, 40000])
@pytest.mark.parametrize("largest", [1, 15, 255])
def test_sums_with_values_are_close_and_do_not_depend_on_the_order(n, largest):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(7, n)).astype(np.float32)
    x *= largest / np.abs(x).max(axis=-1, keepdims=True)
    values = rng.integers(-largest, largest + 1, size=x.shape).astype(np.int32)
    values[0], x[0] = largest, largest  # the largest sums
    terms = x.astype(np.float64) * values
    products, squares = jax.jit(sums_with_values, static_argnums=2)(x, values, largest)
    np.testing.assert_allclose(products, terms.sum(axis=-1), rtol=2e-7, atol=3e-7 * np.abs(terms).sum(axis=-1).max())
    np.testing.assert_allclose(squares, (values.astype(np.int64) ** 2).sum(axis=-1), rtol=1e-6)
    starts = range(0, n, 4096)
    order = np.concatenate([start + rng.permutation(min(4096, n - start)) for start in starts])  # within chunks
    again = jax.jit(sums_with_values, static_argnums=2)(x[:, order], values[:, order], largest)
    np.testing.assert_array_equal(products, again[0])
    np.testing.assert_array_equal(squares, again[1])
