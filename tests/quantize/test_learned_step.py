"""Learned step sizes leave zero: weights that begin as zeros, dead channels, and steps that training made negative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.quantize.learned_step import fake_quant_by_step_size, initial_step_size
from tests.support.integer_products import normal

FORMATS = [*(BipolarFormat(bits) for bits in (1, 4, 8)), TERNARY]
ROWS, K = 3, 16


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-45])
def test_weights_of_a_grid_without_a_step_have_the_straight_through_gradient(step):
    w, cotangent, steps = normal(ROWS, K), jnp.asarray(normal(ROWS, K)), jnp.full((ROWS, 2), step)
    rounded, gradients = jax.vjp(lambda w, steps: fake_quant_by_step_size(w, steps, BipolarFormat(4), 8), w, steps)
    by_w, by_step = gradients(cotangent)
    np.testing.assert_array_equal(rounded, np.zeros_like(w))
    np.testing.assert_array_equal(by_w, cotangent)
    expected = 7.5 * (cotangent * np.sign(w)).reshape(ROWS, 2, 8).sum(axis=-1) / np.sqrt(8 * 7.5)
    np.testing.assert_allclose(by_step, expected, rtol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("start", ["zeros", "a dead channel", "negative steps"])
@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.sgd(0.1)], ids=["adam", "sgd"])
@pytest.mark.usefixtures("standard_promotion")  # optax promotes
@pytest.mark.sample(2)
def test_weights_that_begin_at_zero_learn(fmt, start, optimizer):
    x, target = jnp.asarray(normal(64, K)), jnp.asarray(normal(ROWS, K))
    target = jnp.where(target > 0, 0.5, -0.5)  # on every grid
    w = jnp.zeros((ROWS, K)) if start == "zeros" else 0.5 * jnp.asarray(normal(ROWS, K)).at[1].set(0)
    steps = initial_step_size(w, fmt, 8)
    if start == "negative steps":
        steps = -steps
    losses_of = lambda params: jnp.mean((x @ (fake_quant_by_step_size(*params, fmt, 8) - target).T) ** 2, axis=0)  # noqa: E731

    def update(carry, _):
        params, state = carry
        gradient = jax.grad(lambda params: jnp.sum(losses_of(params)))(params)
        changes, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, changes), state), None

    @jax.jit
    def train(params):
        (trained, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), None, 300)
        return losses_of(params), losses_of(trained), trained

    before, after, (_, steps) = train((w, steps))
    assert np.all(np.asarray(after) < 0.25 * np.asarray(before)), (before, after)
    assert np.all(np.asarray(steps) > 0), steps
