"""Coordinate descent and refits of grids against plain float64: each step is the best one, and the loss never rises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.compress.rounding.descent import descend, loss_of_rows
from bipolar_jax.compress.rounding.grids import FreeGrid, IntegerGrid, ZeroPointGrid
from tests.compress.rounding.problems import hessian_of, losses_of

N, K, SIZE, LARGEST = 6, 40, 16, 7
GROUPS = np.arange(K) // SIZE  # the last group is short
rng = np.random.default_rng(3)
W = rng.normal(size=(N, K))
HESSIAN = hessian_of(K, condition=100)
STEP, BASE = rng.uniform(0.4, 0.8, (N, 3)), rng.uniform(-3, -2, (N, 3))
# The nearest codes, and one off them.
CODES = np.round((W - BASE[:, GROUPS]) / STEP[:, GROUPS]).astype(int) + rng.integers(-1, 2, (N, K))
CODES = np.clip(CODES, 0, LARGEST)
S, O = rng.integers(5, 15, (N, 3)), rng.integers(-60, -30, (N, 3))  # noqa: E741 - the law's names


def floats(x: np.ndarray) -> jax.Array:
    """As the package takes it: inputs or groups first."""
    return jnp.asarray(x.T, jnp.float32)


ROWS, H, START = floats(W), floats(HESSIAN), jnp.asarray(CODES.T, jnp.uint8)
FREE = FreeGrid(floats(STEP), floats(BASE), LARGEST)
ZERO_POINT = ZeroPointGrid(floats(STEP), floats(np.round(-BASE / STEP)), LARGEST, symmetric=False)
INTEGERS = IntegerGrid(jnp.full(N, 0.05, jnp.float32), floats(S), floats(O), LARGEST, keeps_zero=False)
ZERO_INTEGERS = dataclasses.replace(INTEGERS, o=-INTEGERS.s * floats(rng.integers(2, 5, (N, 3))), keeps_zero=True)
every_grid = pytest.mark.parametrize(
    "grid", [FREE, ZERO_POINT, INTEGERS, ZERO_INTEGERS], ids=["free", "zero point", "integers", "integers with zero"]
)


def numbers_of(grid, codes) -> np.ndarray:
    affine = grid.affine()
    step, base = (np.asarray(a, np.float64).T[:, GROUPS] for a in (affine.step, affine.base))
    return step * np.asarray(codes, np.float64).T + base


def quant_ease(w, codes, hessian, step, base) -> np.ndarray:
    """arXiv 2309.01885, algorithm 1 without outliers, one iteration, as its equations stand: a code at a time."""
    codes = codes.copy()
    for j in range(len(hessian)):
        q = step * codes + base
        others = np.arange(len(hessian)) != j
        best = w @ hessian[:, j] - q[:, others] @ hessian[others, j]
        best = best / hessian[j, j]
        codes[:, j] = np.clip(np.floor((best - base[:, j]) / step[:, j] + 0.5), 0, LARGEST)
    return codes


def test_a_pass_is_that_of_quant_ease():
    want = quant_ease(W, CODES, HESSIAN, STEP[:, GROUPS], BASE[:, GROUPS])
    got = descend(ROWS, START, H, FREE.affine(), jnp.asarray(GROUPS), 16)
    np.testing.assert_array_equal(got.T, want)


@every_grid
def test_the_loss_never_rises(grid):
    """In ten refits and passes; at last nothing moves any more, or hardly."""

    @jax.jit
    def refit_and_descend(grid, codes):
        grid = grid.refit(ROWS, codes, H, SIZE)
        return grid, descend(ROWS, codes, H, grid.affine(), jnp.asarray(GROUPS), 16)

    codes, losses = START, [losses_of(W, numbers_of(grid, START), HESSIAN)]
    for _ in range(10):
        grid, descended = refit_and_descend(grid, codes)
        losses += [losses_of(W, numbers_of(grid, each), HESSIAN) for each in (codes, descended)]
        codes = descended
    falls = -np.diff(losses, axis=0)
    assert falls.min() >= -1e-5 * losses[-1].min()
    assert falls[:2].min() > 0
    np.testing.assert_allclose(loss_of_rows(ROWS, floats(numbers_of(grid, codes)), H), losses[-1], rtol=1e-4)
    if isinstance(grid, IntegerGrid):
        s, o = (np.asarray(a) for a in (grid.s, grid.o))
        assert s.min() >= 1
        assert o.min() >= -128
        assert (o + LARGEST * s).max() <= 127
        np.testing.assert_array_equal([s, o], np.round([s, o]))
        assert not grid.keeps_zero or np.all(o % s == 0)


def least_squares(columns: np.ndarray) -> np.ndarray:
    """The least loss of numbers theta @ columns [n, unknowns, K] for each row."""
    factor = np.linalg.cholesky(HESSIAN)
    found = []
    for w, basis in zip(W, columns, strict=True):
        theta = np.linalg.lstsq(factor.T @ basis.T, factor.T @ w, rcond=None)[0]
        found.append(theta @ basis)
    return losses_of(W, np.array(found), HESSIAN)


@pytest.mark.parametrize("grid", [FREE, ZERO_POINT], ids=["free", "zero point"])
def test_refits_end_at_the_least_squares_of_all_groups(grid):
    """Passes over three groups get there, nine tenths of the way with the first."""
    inside = np.eye(3)[:, GROUPS]
    if grid is FREE:
        columns = np.concatenate([CODES[:, None] * inside, np.broadcast_to(inside, (N, 3, K))], axis=1)
    else:
        columns = (CODES - np.asarray(grid.zero).T[:, GROUPS])[:, None] * inside
    best = least_squares(columns)
    refit = jax.jit(lambda grid: grid.refit(ROWS, START, H, SIZE))
    losses = []
    for _ in range(50):
        losses.append(losses_of(W, numbers_of(grid, START), HESSIAN))
        grid = refit(grid)
    np.testing.assert_allclose(losses[-1], best, rtol=1e-4)
    assert np.sum(losses[0] - losses[1]) > 0.9 * np.sum(losses[0] - best)


def test_one_refit_is_the_least_squares_of_one_group():
    grid = FreeGrid(floats(STEP[:, :1]), floats(BASE[:, :1]), LARGEST).refit(ROWS, START, H, K)
    q = np.asarray(grid.step).T * CODES + np.asarray(grid.base).T
    columns = np.stack([CODES, np.ones_like(CODES)], axis=1)
    np.testing.assert_allclose(losses_of(W, q, HESSIAN), least_squares(columns), rtol=1e-4)


def test_integers_are_the_best_around_the_best_step():
    """Against all o for each s, in float64: of the first group, which sees the others as they are."""
    refitted = INTEGERS.refit(ROWS, START, H, SIZE)
    before = INTEGERS._with_best_row_scale(ROWS, START, H, SIZE)
    q = numbers_of(before, START)
    first = GROUPS == 0
    factor = np.linalg.cholesky(HESSIAN).T
    for row, unit in enumerate(np.asarray(before.row_scale, np.float64)):
        u = CODES[row] * first

        def losses(s, o, row=row, unit=unit):
            trial = np.where(first, unit * (s * CODES[row] + o[:, None]), q[row])
            return losses_of(W[row][None], trial, HESSIAN)

        rest = W[row] - np.where(first, 0, q[row])
        best_step = np.linalg.lstsq(factor @ np.stack([u, first], axis=1), factor @ rest, rcond=None)[0][0]
        nearest = int(np.round(best_step / unit))
        tried = {S[row, 0], *np.clip(nearest + np.arange(-1, 2), 1, 255 // LARGEST)}
        best = min(losses(s, np.arange(-128, 128 - LARGEST * s)).min() for s in tried)
        got = losses(np.asarray(refitted.s)[0, row], np.asarray(refitted.o)[0, row][None])
        assert best * (1 - 1e-5) <= got[0] <= best * (1 + 1e-5)


def test_grids_of_zeros_stay():
    """A row of zeros has step 0, and a row scale of 0."""
    zeros = jnp.zeros((K, 1), jnp.float32)
    codes = jnp.full((K, 1), 4, jnp.uint8)
    none = jnp.zeros((3, 1), jnp.float32)
    grids = FreeGrid(none, none, LARGEST), IntegerGrid(jnp.zeros(1), none + 1, none - 4, LARGEST, keeps_zero=False)
    for grid in grids:
        refitted = grid.refit(zeros, codes, H, SIZE)
        np.testing.assert_array_equal(numbers_of(refitted, codes), 0)
        np.testing.assert_array_equal(descend(zeros, codes, H, refitted.affine(), jnp.asarray(GROUPS), 16), codes)
