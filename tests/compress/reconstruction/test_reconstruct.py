"""Reconstruction of blocks: its arrays against numpy, and that blocks come nearer to those of the float model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.compress.reconstruction import Reconstruction
from bipolar_jax.compress.reconstruction.learned_grid import INSIDE, LearnedRows, StartGrid, numbers, packed
from bipolar_jax.compress.reconstruction.reconstruct import stream_loss
from bipolar_jax.format import TERNARY
from bipolar_jax.packing import quantize

K, N, SIZE = 20, 6, 8


def layer(bits, group_size, calibration, scales, **options):
    floats = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    array = quantize(jnp.asarray(floats), bits, -2, group_size, calibration, scales)
    start = StartGrid.of(array)
    options = {"learn_groups": True, "keeps_zero": False} | options
    return array, floats, start, LearnedRows.of(array, jnp.asarray(floats), start, **options)


GRIDS = [
    (4, SIZE, None, "integer"),
    (2, SIZE, None, "float"),
    (3, None, "absmax", None),
    (TERNARY, None, "absmean", None),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_learning_starts_at_the_packed_array_and_returns_to_one(grid):
    """Against the formula in float64 numpy, after all that learns has moved."""
    array, _, start, learned = layer(*grid)
    size = grid[1] or K
    wanted = np.asarray(array.dequantize(), np.float64).T
    np.testing.assert_allclose(numbers(start, learned, grid[1]), wanted, atol=1e-6)
    again = packed(start, learned, array.format, grid[1], has_offset=array.offset is not None)
    for one, other in zip(*map(jax.tree.leaves, (again, array)), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=1e-6, atol=1e-7)
    codes = np.asarray(array.codes(), np.float64)
    assert np.all(np.abs(learned.codes - codes) <= INSIDE + 1e-6)

    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.4 * rng.standard_normal(x.shape).astype(np.float32), learned)
    step, base = (np.asarray(x, np.float64) for x in (start.step, start.base))
    largest = array.format.max_value
    u = np.clip(np.round(np.asarray(moved.codes, np.float64)), 0, largest)
    step = step * (1 + np.asarray(moved.step, np.float64))
    zero = np.asarray(start.base, np.float64) / np.asarray(start.step, np.float64) + np.asarray(moved.shift)
    if start.row_scale is not None:
        step = np.clip(np.round(step), 1, 255 // largest)
        base = np.clip(np.round(step * zero), -128, 127 - largest * step)
        unit = np.asarray(start.row_scale, np.float64) * (1 + np.asarray(moved.row_scale, np.float64))
        step, base = unit * step, unit * base
    else:
        base = step * zero
    spread = lambda x: np.repeat(x, size, axis=-1)[:, :K]  # noqa: E731
    wanted = spread(step) * u + spread(base)
    np.testing.assert_allclose(numbers(start, moved, grid[1]), wanted, rtol=1e-4, atol=1e-4)
    if np.all(step > 0):
        result = packed(start, moved, array.format, grid[1], has_offset=True)
        np.testing.assert_allclose(result.dequantize().T, wanted, rtol=1e-4, atol=1e-4)


def test_updates_begin_with_a_pass_that_moves_nothing():
    updates = Reconstruction(epochs=3).updates(4)
    assert updates[:4] == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)]
    assert updates[4][1] == 1
    rates = [rate for _, rate in updates[4:]]
    assert rates == sorted(rates, reverse=True)
    for start in range(4, 16, 4):
        assert sorted(batch for batch, _ in updates[start : start + 4]) == [0, 1, 2, 3]


def test_zero_keeps_its_place_where_it_is_asked_to():
    array, _, start, learned = layer(4, SIZE, None, "integer", keeps_zero=True)
    assert learned.shift is None
    moved = dataclasses.replace(learned, step=learned.step + 0.3)
    groups = packed(start, moved, array.format, SIZE, has_offset=False).groups
    before = array.groups
    assert not np.array_equal(groups.scale, before.scale)
    (s, o), (s_before, o_before) = (
        (np.asarray(each.scale, int), np.asarray(each.offset, int)) for each in (groups, before)
    )
    inside = (o > -128) & (o + 15 * s < 127)
    assert inside.any()
    np.testing.assert_array_equal((o * s_before)[inside], (s * o_before)[inside])
    *_, fixed = layer(4, SIZE, None, "integer", learn_groups=False)
    assert fixed.step is None
    assert fixed.shift is None
    assert fixed.row_scale.shape == (N, 1)


def test_gradients_of_the_grid_are_those_of_finite_differences():
    """The loss of one layer in float64 numpy; codes do not change by small changes of a grid."""
    array, _, start, learned = layer(2, SIZE, None, "float")
    rng = np.random.default_rng(2)
    x, target = rng.standard_normal((30, K)), 3 * rng.standard_normal((30, N))

    def loss(changed):
        return stream_loss(jnp.asarray(x, jnp.float32) @ numbers(start, changed, SIZE).T, jnp.asarray(target))

    codes, step, base = (np.asarray(a, np.float64) for a in (array.codes(), start.step, start.base))
    spread = lambda a: np.repeat(a, SIZE, axis=-1)[:, :K]  # noqa: E731

    def exact(change, shift):
        w = spread((1 + change) * step) * codes + spread((1 + change) * (base + step * shift))
        return np.mean(np.mean((x @ w.T - target) ** 2, axis=-1) / np.mean(target**2, axis=-1))

    found = jax.grad(loss)(learned)
    assert float(loss(learned)) == pytest.approx(exact(0 * step, 0 * step), rel=1e-5)
    for row, group in [(0, 0), (3, 2)]:
        at = np.zeros_like(step)
        at[row, group] = 1e-4
        differences = [
            (exact(change, shift) - exact(-change, -shift)) / 2e-4 for change, shift in ((at, 0 * at), (0 * at, at))
        ]
        np.testing.assert_allclose([found.step[row, group], found.shift[row, group]], differences, rtol=1e-3)
    # Straight through: by a latent code as by the code, were it any number.
    w = spread(step) * codes + spread(base)
    error = 2 * (x @ w.T - target) / N / np.mean(target**2, axis=-1, keepdims=True) / len(x)
    np.testing.assert_allclose(found.codes, (error.T @ x) * spread(step), rtol=1e-3, atol=1e-6)
