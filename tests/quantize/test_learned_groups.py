"""Integer groups that are learned: gradients of the straight-through surrogate, and the numbers of packed weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bipolar_jax as bj
from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.quantize.groups import group_lengths
from bipolar_jax.quantize.integer_groups import largest_scale
from bipolar_jax.quantize.learned_step import LearnedGroups, fake_quant_by_groups
from tests.support.integer_products import normal

FORMATS = [*(BipolarFormat(bits) for bits in (1, 3, 4, 6)), TERNARY]
ROWS, K, SIZE = 3, 37, 16  # the last group is shorter

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def learned_floats(w: np.ndarray, fmt: BipolarFormat) -> LearnedGroups:
    """Floats within the limits of their integers, on grids that clip some numbers."""
    rng, shape = np.random.default_rng(2), (ROWS, -(-K // SIZE))
    scale = largest_scale(fmt) * rng.uniform(0.3, 0.8, shape)
    offset = rng.uniform(-3, 3, shape) - scale * fmt.max_value / 2
    reach = scale.max(axis=1, keepdims=True) * fmt.max_value / 2
    row_scale = np.abs(w).max(axis=1, keepdims=True) / (1.2 * reach)
    return LearnedGroups(*(jnp.asarray(a, jnp.float32) for a in (row_scale, scale, offset)))


def per_number(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, SIZE, axis=-1)[:, :K]


@every_format
def test_gradients_are_those_of_the_straight_through_surrogate(fmt):
    """Central differences in float64: every rounding adds a constant, and u keeps to its codes."""
    w, learned = normal(ROWS, K).astype(np.float64), learned_floats(normal(ROWS, K), fmt)
    point = [w, *(np.asarray(a, np.float64) for a in (learned.row_scale, learned.scale, learned.offset))]
    assert np.all((point[3] > -128) & (point[3] < 127 - fmt.max_value * np.round(point[2])))
    constants = [np.round(point[2]) - point[2], np.round(point[3]) - point[3]]
    cotangent = normal(ROWS, K, seed=1).astype(np.float64)

    def codes(w, row_scale, scale, offset):
        s, o = scale + constants[0], offset + constants[1]
        return np.clip((w / row_scale - per_number(o)) / per_number(s), 0, fmt.max_value)

    rounding = np.round(codes(*point)) - codes(*point)

    def surrogate(w, row_scale, scale, offset):
        s, o = scale + constants[0], offset + constants[1]
        u = codes(w, row_scale, scale, offset) + rounding
        return np.sum(cotangent * row_scale * (per_number(s) * u + per_number(o)))

    def differences(which):
        gradient = np.zeros_like(point[which])
        for index in np.ndindex(gradient.shape):
            moved = [[a.copy() for a in point] for _ in range(2)]
            step = 1e-6 * max(abs(point[which][index]), 1e-2)
            for arguments, move in zip(moved, (step, -step), strict=True):
                arguments[which][index] += move
            gradient[index] = (surrogate(*moved[0]) - surrogate(*moved[1])) / (2 * step)
        return gradient

    loss = lambda w, learned: jnp.sum(fake_quant_by_groups(w, learned, fmt, SIZE) * cotangent.astype(np.float32))  # noqa: E731
    by_w, by_learned = jax.grad(loss, argnums=(0, 1))(jnp.asarray(w, jnp.float32), learned)
    np.testing.assert_allclose(by_w, differences(0), rtol=1e-4, atol=1e-4)
    assert 0 < np.count_nonzero(by_w) < by_w.size  # some numbers are clipped
    for which, got, size in (
        (1, by_learned.row_scale, None),
        (2, by_learned.scale, SIZE),
        (3, by_learned.offset, SIZE),
    ):
        balance = 1 / np.sqrt(group_lengths(K, size) * fmt.max_value / 2)
        expected = differences(which) * balance
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@every_format
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.sample(2)
def test_packed_weights_have_the_bits_of_the_rounded_ones(fmt, dtype):
    w = jnp.asarray(normal(2, K, 5), dtype)
    dot_general = bj.DotGeneral(fmt, 8, SIZE, implementation="xla")
    step_size = dot_general.initial_step_size(w)
    start = bj.quantize(w.astype(jnp.float32), fmt, -2, SIZE)
    packed = dot_general.pack(w, step_size)
    # Training begins with what `quantize` finds.
    jax.tree.map(np.testing.assert_array_equal, packed.groups, start.groups)
    np.testing.assert_allclose(packed.scale, start.scale, rtol=1e-6)
    step_size = step_size + 0.05 * jnp.asarray(normal(*step_size.shape, seed=1))
    packed = dot_general.pack(w, step_size)
    packed.groups.check(fmt, packed.groups.scale.shape)
    for fake_quant in (dot_general.fake_quant, jax.jit(dot_general.fake_quant)):
        np.testing.assert_array_equal(packed.dequantize(), fake_quant(w, step_size))


def test_an_array_of_step_sizes_is_the_same_floats():
    learned = learned_floats(normal(ROWS, K), BipolarFormat(4))
    again = LearnedGroups.of_step_size(learned.step_size(BipolarFormat(4)), BipolarFormat(4))
    for field in dataclasses.fields(LearnedGroups):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(learned, field.name))


def test_beyond_their_limits_integers_have_gradients_that_lead_back():
    fmt, w = BipolarFormat(4), normal(2, SIZE)
    below = LearnedGroups(jnp.full((2, 1), 0.1), jnp.full((2, 1), 0.2), jnp.full((2, 1), -140.0))
    above = LearnedGroups(jnp.full((2, 1), 1e-4), jnp.full((2, 1), 20.0), jnp.full((2, 1), 5.0))

    def gradient(learned, sign):
        return jax.grad(lambda learned: sign * jnp.sum(fake_quant_by_groups(w, learned, fmt, SIZE)))(learned)

    for learned, forward in ((below, -1), (above, 1)):
        (_, groups), gradients = learned.rounded(fmt), [gradient(learned, sign) for sign in (1, -1)]
        groups.check(fmt, (2, 1))
        for name in ("scale", "offset"):
            both = np.stack([np.asarray(getattr(each, name)) for each in gradients])
            assert np.any(both != 0)
            assert np.all(both * forward >= 0), name  # descent moves against it


@pytest.mark.parametrize("start", ["zeros", "a dead channel", "negative scales"])
@pytest.mark.usefixtures("standard_promotion")  # optax promotes
def test_weights_that_begin_at_zero_learn(start):
    fmt, optimizer = BipolarFormat(3), optax.adam(1e-2)
    x, target = jnp.asarray(normal(64, 16)), jnp.where(jnp.asarray(normal(ROWS, 16)) > 0, 0.5, -0.5)
    w = jnp.zeros((ROWS, 16)) if start == "zeros" else 0.5 * jnp.asarray(normal(ROWS, 16)).at[1].set(0)
    steps = LearnedGroups.initial(w, fmt, 8, "absmax").step_size(fmt)
    if start == "negative scales":
        steps = steps.at[:, 0].multiply(-1)
    rounded = lambda w, steps: fake_quant_by_groups(w, LearnedGroups.of_step_size(steps, fmt), fmt, 8)  # noqa: E731
    losses_of = lambda params: jnp.mean((x @ (rounded(*params) - target).T) ** 2, axis=0)  # noqa: E731

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
    assert np.all(np.asarray(steps[:, 0]) > 0), steps
