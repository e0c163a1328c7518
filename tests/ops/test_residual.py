"""A residual that the product adds: the same numbers as an addition after it, its gradient, and errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax import BipolarArray, matmul, quantize
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.ops import RMSNorm
from tests.support.backends import PORTABLE
from tests.support.interpreter import races_found

K, N = 40, 6


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(scope="module")
def w() -> BipolarArray:
    return quantize(normal(K, N, seed=1), 3, 0, 32, "minmax", scales="float")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("a_bits", [1, 8, None])
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.sample(2)
def test_it_is_added_to_the_rounded_product(w, implementation, a_bits, dtype):
    x, residual = normal(2, 3, K, dtype=dtype), 30 * normal(2, 3, N, seed=2, dtype=dtype)
    options = dict(
        bias=normal(N, seed=3), prologue=RMSNorm(1 + normal(K, seed=4) / 4, 1e-5), implementation=implementation
    )
    found = matmul(x, w, a_bits, residual=residual, **options)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, residual + matmul(x, w, a_bits, **options))


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("clean_interpreter")
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.sample(1)
def test_hopper_kernels_add_the_same(m, group_size):
    """Few tokens and many, of more columns than a whole number of copied bytes."""
    w = quantize(normal(K, 203, seed=1), 2, 0, group_size, scales="float")
    x, residual = normal(m, K, dtype=jnp.bfloat16), 30 * normal(m, 203, seed=2, dtype=jnp.bfloat16)
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        product = matmul(x, w, 2, implementation="sm90")
        found = matmul(x, w, 2, residual=residual, implementation="sm90")
    assert not races_found()
    np.testing.assert_array_equal(found, residual + product)


@pytest.mark.parametrize("a_bits", [2, None])
def test_its_gradient_is_the_cotangent_and_others_stay(w, a_bits):
    x, residual, cotangent = normal(3, K), normal(3, N, seed=2), normal(3, N, seed=3)

    def fused(x, residual):
        return jnp.sum(matmul(x, w, a_bits, residual=residual) * cotangent)

    def after(x, residual):
        return jnp.sum((residual + matmul(x, w, a_bits)) * cotangent)

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, residual) for f in (fused, after))
    np.testing.assert_array_equal(found[1], cotangent)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_batch_axes_of_w_lead_its_own_too():
    w = quantize(normal(2, K, N, seed=1), 2, 1)
    x, residual = normal(2, 5, K), normal(2, 5, N, seed=2)
    np.testing.assert_allclose(matmul(x, w, 2, residual=residual), residual + matmul(x, w, 2), rtol=1e-6, atol=1e-6)


def test_a_linear_layer_takes_one():
    layer = bj.nn.Linear(K, N, precision=bj.Precision.parse("W2A2"), rngs=nnx.Rngs(0))
    x, residual = normal(4, K), normal(4, N, seed=2)
    np.testing.assert_array_equal(layer(x, residual=residual), residual + layer(x))


@pytest.mark.parametrize("residual", [normal(4, N), normal(3, N, dtype=jnp.bfloat16), normal(N)])
def test_another_shape_or_dtype_is_refused(w, residual):
    with pytest.raises(ValueError, match=r"the product float32 of shape \(3, 6\): they must be the same"):
        matmul(normal(3, K), w, 2, residual=residual)
