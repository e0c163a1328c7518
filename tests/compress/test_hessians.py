"""Second moments of inputs, against NumPy in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.compress.hessians import SecondMoments
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from bipolar_jax.quantize.precision import activation_format


def numbers(x, a_bits):
    """Tokens on the grid of 2^a_bits steps from their smallest to their largest number; zero is on it."""
    x = x.astype(np.float64)
    step = (np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0))[:, None] / (2**a_bits - 1)
    zero = np.rint(-np.minimum(x.min(-1), 0)[:, None] / step)
    return (np.clip(np.rint(x / step) + zero, 0, 2**a_bits - 1) - zero) * step


@pytest.mark.parametrize(("a_bits", "weighted"), [(None, True), (8, False), (4, True)])
def test_batches_sum_to_the_mean_over_weighted_tokens(a_bits, weighted):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 5, 24)).astype(np.float32)
    stream = rng.standard_normal((3, 2, 5, 8)).astype(np.float32) * rng.uniform(0.1, 10, (3, 2, 5, 1)).astype(
        np.float32
    )
    sums = SecondMoments.zeros(24)
    for batch, streams in zip(x, stream, strict=True):
        sums = sums.add(jnp.asarray(batch), a_bits, jnp.asarray(streams) if weighted else None)
    rows = x.reshape(-1, 24)
    if a_bits is not None:
        quantized = quantize_tokens(jnp.asarray(rows), activation_format(a_bits)).dequantize(activation_format(a_bits))
        np.testing.assert_allclose(quantized, numbers(rows, a_bits), atol=1e-5)
        rows = np.asarray(quantized)
    rows = rows.astype(np.float64)
    weights = 1 / np.square(stream.reshape(-1, 8).astype(np.float64)).mean(-1) if weighted else np.ones(len(rows))
    weights /= weights.mean()
    hessian = np.asarray(sums.hessian())
    np.testing.assert_allclose(hessian, (rows * weights[:, None]).T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert np.array_equal(hessian, hessian.T)


def test_cross_products_are_means_with_the_same_weights():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 6, 4)).astype(np.float32)
    stream = rng.standard_normal((6, 3)).astype(np.float32)
    zeros = SecondMoments.zeros(4, with_cross=True)
    sums = zeros.add(jnp.asarray(x), None, jnp.asarray(stream), jnp.asarray(y))
    weights = 1 / np.square(stream.astype(np.float64)).mean(-1)
    np.testing.assert_allclose(sums.cross(), (x * weights[:, None]).T @ y / weights.sum(), rtol=1e-4, atol=1e-5)
    same = zeros.add(jnp.asarray(x), None, jnp.asarray(stream), jnp.asarray(x))
    np.testing.assert_allclose(same.cross(), same.hessian(), rtol=1e-5, atol=1e-6)
    assert SecondMoments.zeros(4).cross() is None


def test_tokens_of_zeros_have_no_weight():
    x, stream = np.eye(4, dtype=np.float32), np.ones((4, 2), np.float32)
    stream[1] = 0
    hessian = SecondMoments.zeros(4).add(jnp.asarray(x), None, jnp.asarray(stream)).hessian()
    np.testing.assert_allclose(hessian, np.diag([1, 0, 1, 1]) / 3, rtol=1e-6)
