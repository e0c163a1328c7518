"""Gradients of ops.matmul are those of the straight-through function its docstring defines."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarArray, BipolarFormat, matmul, quantize
from bipolar_jax.kernels.semantics.activations import quantize_tokens

M, K, N = 3, 12, 4


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loss(x, scale, offset, bias, w: BipolarArray, a_bits: int | None, cotangent):
    w = dataclasses.replace(w, scale=scale, offset=offset)
    return jnp.sum(matmul(x, w, a_bits, bias=bias) * cotangent)


def surrogate(x, w: BipolarArray, a_bits: int | None, cotangent):
    """sum(cotangent * ((x + c) @ (scale * v + offset) + bias)) in float64, c = x^ - x held fixed at this x."""
    x_hat = x
    if a_bits is not None:
        x_hat = quantize_tokens(jnp.asarray(x), BipolarFormat(a_bits)).dequantize(BipolarFormat(a_bits))
    fixed = np.asarray(x_hat, np.float64) - np.asarray(x, np.float64)
    values = np.asarray(w.values(), np.float64)
    spread = lambda figure: np.repeat(figure, w.group_size or K, axis=-1)[:, :K].T  # noqa: E731

    def function(x, scale, offset, bias):
        w_hat = spread(scale) * values + (0 if offset is None else spread(offset))
        return np.sum(cotangent * ((x + fixed) @ w_hat + (0 if bias is None else bias)))

    return function


def central_differences(function, arguments: list, which: int) -> np.ndarray:
    """Exact up to rounding of float64, because the surrogate is linear in each argument."""
    step, gradient = 1e-2, np.zeros_like(arguments[which])
    for index in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = [None if a is None else a.copy() for a in arguments]
            moved[which][index] += sign * step
            ends.append(function(*moved))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("a_bits", [1, 2, 8, None])
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize(("calibration", "biased"), [("absmax", False), ("minmax", True)])
@pytest.mark.sample(2)
def test_gradients_are_those_of_the_straight_through_definition(a_bits, group_size, calibration, biased):
    w = quantize(normal(K, N, seed=1), 3, 0, group_size, calibration, scales="float")
    x, cotangent = normal(M, K), normal(M, N, seed=2)
    bias = normal(N, seed=3) if biased else None
    arguments = [x, w.scale, w.offset, bias]
    present = [i for i, a in enumerate(arguments) if a is not None]
    got = jax.jit(jax.grad(loss, argnums=present), static_argnums=5)(*arguments, w, a_bits, cotangent)
    function = surrogate(x, w, a_bits, cotangent)
    wide = [None if a is None else np.asarray(a, np.float64) for a in arguments]
    for i, gradient in zip(present, got, strict=True):
        expected = central_differences(function, wide, i)
        # Sums of at most 3 * 12 products of order 10 in float32.
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4, err_msg=f"argument {i}")


@pytest.fixture(scope="module")
def w() -> BipolarArray:
    return quantize(normal(K, N, seed=1), 4, 0, 5, "minmax", scales="float")


def gradient_of_x(x, w, **kwargs):
    return jax.grad(lambda x: jnp.sum(matmul(x, w, 8, **kwargs).astype(jnp.float32) ** 2))(x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_have_the_dtypes_of_what_they_are_of(w, dtype):
    x, bias = jnp.asarray(normal(M, K), dtype), jnp.zeros(N, dtype)
    dx, dbias = jax.grad(lambda x, bias: matmul(x, w, 8, bias=bias).astype(jnp.float32).sum(), argnums=(0, 1))(x, bias)
    assert dx.dtype == dbias.dtype == dtype
    assert dbias.tolist() == [M] * N


def test_every_backend_has_the_same_gradient(w):
    one, other = (gradient_of_x(normal(M, K), w, implementation=name) for name in ("reference", "xla"))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_packed_bits_have_no_gradient(w):
    gradient = jax.grad(lambda w: matmul(normal(M, K), w, 8).sum(), allow_int=True)(w)
    assert gradient.planes.dtype == jax.dtypes.float0
    assert gradient.row_sums.dtype == jax.dtypes.float0
    assert gradient.scale.shape == w.scale.shape


def test_gradient_sums_over_batch_axes_of_x(w):
    x = normal(2, M, K)
    grad = jax.grad(lambda scale, x: matmul(x, dataclasses.replace(w, scale=scale), 8).sum())
    np.testing.assert_allclose(grad(w.scale, x), grad(w.scale, x.reshape(-1, K)), rtol=1e-5, atol=1e-4)


def test_gradient_with_batch_axes_of_w_is_that_of_each_matrix():
    stack = quantize(normal(2, K, N, seed=1), 4, -2)
    x = normal(2, M, K)
    both = gradient_of_x(x, stack)
    for i in range(2):
        alone = gradient_of_x(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], stack))
        np.testing.assert_allclose(both[i], alone, rtol=1e-5, atol=1e-4)


def chain(x, stack, body):
    y, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, stack)
    return jnp.sum(y**2)


def test_gradient_through_scan_and_checkpoint_is_that_of_the_plain_chain():
    stack = quantize(normal(3, K, K, seed=1) / 4, 4, -2)
    body = lambda x, w: jnp.tanh(matmul(x, w, None))  # noqa: E731

    def plain(x):
        for i in range(3):
            x = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], stack))
        return jnp.sum(x**2)

    x = normal(M, K)
    expected = jax.jit(jax.grad(plain))(x)
    scanned = jax.jit(jax.grad(lambda x: chain(x, stack, body)))(x)
    rematerialized = jax.jit(jax.grad(lambda x: chain(x, stack, jax.checkpoint(body))))(x)
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rematerialized, expected, rtol=1e-4, atol=1e-6)


def test_checkpointed_quantized_products_differentiate_in_scan():
    stack = quantize(normal(3, K, K, seed=1) / 4, 4, -2)
    body = lambda x, w: matmul(x, w, 8)  # noqa: E731
    x = normal(M, K)
    kept, again = (jax.jit(jax.grad(lambda x, b=b: chain(x, stack, b)))(x) for b in (body, jax.checkpoint(body)))
    assert np.abs(kept).max() > 0
    np.testing.assert_allclose(kept, again, rtol=1e-4, atol=1e-6)


def test_a_nan_row_spoils_the_gradient_of_no_other_row(w):
    x = normal(M, K)
    clean = gradient_of_x(x, w)
    x[1, 3] = np.nan
    gradient = np.asarray(gradient_of_x(x, w))
    assert np.isnan(gradient[1]).all()
    np.testing.assert_array_equal(gradient[[0, 2]], clean[np.array([0, 2])])
