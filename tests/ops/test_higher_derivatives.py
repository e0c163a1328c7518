"""Derivatives of gradients are those of the straight-through function; forward mode works or says what does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from tests.support.integer_products import normal

DENSE = (((1,), (0,)), ((), ()))
X, W = jnp.asarray(normal(2, 8)), jnp.asarray(normal(8, 3, seed=1))
PACKED = bj.quantize(W, 4, axis=0)
A8 = bj.BipolarFormat(8)


def straight_through(x, w):
    """(x + stop_gradient(x^ - x)) @ w^, the function that the documents say is differentiated."""
    x_hat = quantize_tokens(x, A8).dequantize(A8)
    return jnp.dot(x + jax.lax.stop_gradient(x_hat - x), w, precision="highest")


def by_dot_general(x, w):
    return bj.DotGeneral(4, 8)(x, w, DENSE)


def by_fake_quant(x, w):
    return straight_through(x, bj.fake_quant(w, 4, axis=0))


def by_matmul(x, scale):
    return bj.matmul(x, dataclasses.replace(PACKED, scale=scale), 8)


def by_dequantize(x, scale):
    return straight_through(x, dataclasses.replace(PACKED, scale=scale).dequantize())


@pytest.mark.parametrize(
    ("found", "expected", "second"),
    [(by_dot_general, by_fake_quant, W), (by_matmul, by_dequantize, PACKED.scale)],
    ids=["DotGeneral", "matmul"],
)
def test_a_penalty_on_a_gradient_has_the_gradient_of_the_documented_function(found, expected, second):
    def penalty(function):
        def loss(x, w):
            dx, dw = jax.grad(lambda x, w: jnp.sum(jnp.tanh(function(x, w))), argnums=(0, 1))(x, w)
            return jnp.sum(dx**2) + jnp.sum(dw**2)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(X, second)

    for ours, theirs in zip(penalty(found), penalty(expected), strict=True):
        assert jnp.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_hessian_by_reverse_mode():
    hessian = jax.jacrev(jax.grad(lambda x: jnp.sum(bj.matmul(x, PACKED, 8) ** 2)))(X[0])
    w = PACKED.dequantize()
    np.testing.assert_allclose(hessian, 2 * w @ w.T, rtol=1e-4, atol=1e-4)


def test_fake_quant_has_forward_mode():
    value, tangent = jax.jvp(lambda w: bj.fake_quant(w, 4, axis=0), (W,), (jnp.ones_like(W),))
    np.testing.assert_array_equal(value, bj.fake_quant(W, 4, axis=0))
    np.testing.assert_array_equal(tangent, jnp.ones_like(W))
    assert jax.hessian(lambda w: jnp.sum(bj.fake_quant(w, 4, axis=0) ** 2))(W).shape == (8, 3, 8, 3)


@pytest.mark.parametrize("function", [lambda x: by_dot_general(x, W), lambda x: bj.matmul(x, PACKED, 8)])
@pytest.mark.parametrize("derivative", [jax.jacfwd, lambda f: jax.hessian(lambda x: jnp.sum(f(x)))])
def test_forward_mode_of_products_is_refused(function, derivative):
    with pytest.raises(TypeError, match="forward-mode"):
        derivative(function)(X)
