"""GPTQ against the paper's algorithm in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax.compress.rounding import Rounding, round_rows
from bipolar_jax.compress.rounding.affine_grid import AffineGrid, NestedGrid
from bipolar_jax.compress.rounding.gptq import gptq, with_damping
from tests.compress.rounding.problems import hessian_of, losses_of

N, K, GROUP, LARGEST = 6, 40, 16, 15


def paper_gptq(w, hessian, step, base, act_order: bool) -> np.ndarray:
    """arXiv 2210.17323, algorithm 1, without lazy batches: w [n, k] float64; step, base [n, k]. Codes."""
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(hessian))
    w, step, base = (a[:, order].copy() for a in (w, step, base))
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    codes = np.zeros(w.shape, int)
    for j in range(len(order)):
        codes[:, j] = np.clip(np.floor((w[:, j] - base[:, j]) / step[:, j] + 0.5), 0, LARGEST)
        error = (w[:, j] - (step[:, j] * codes[:, j] + base[:, j])) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    result = np.zeros_like(codes)
    result[:, order] = codes
    return result


def problem(condition: float = 1e3):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(N, K))
    groups = np.arange(K) // GROUP
    step, base = rng.uniform(0.3, 0.5, (N, groups[-1] + 1)), rng.uniform(-4, -2, (N, groups[-1] + 1))
    return w, hessian_of(K, condition=condition), step, base, groups


@pytest.mark.parametrize("act_order", [True, False])
def test_codes_are_those_of_the_paper(act_order):
    """With blocks that do not divide K."""
    w, hessian, step, base, groups = problem()
    want = paper_gptq(w, hessian, step[:, groups], base[:, groups], act_order)
    grid = AffineGrid(jnp.asarray(step.T, jnp.float32), jnp.asarray(base.T, jnp.float32), LARGEST)
    floats = jnp.asarray(w.T, jnp.float32), jnp.asarray(hessian, jnp.float32)
    got = gptq(*floats, grid, jnp.asarray(groups), act_order=act_order, block=16)
    np.testing.assert_array_equal(got.T, want)


def test_float32_serves_a_hessian_of_condition_1e7():
    """The least damping that float32 needs costs the loss less than 3%; that of the method hides the condition."""
    w, hessian, step, base, groups = problem(condition=1e7)
    grid = AffineGrid(jnp.asarray(step.T, jnp.float32), jnp.asarray(base.T, jnp.float32), LARGEST)
    for damping, tolerance in ((0.0, 0.03), (0.01, 1e-3)):
        exact = hessian + damping * np.eye(K)
        want = paper_gptq(w, exact, step[:, groups], base[:, groups], True)
        damped = with_damping(jnp.asarray(hessian, jnp.float32), damping)
        got = gptq(jnp.asarray(w.T, jnp.float32), damped, grid, jnp.asarray(groups), act_order=True, block=64)
        numbers = (step[:, groups] * np.asarray(codes, int) + base[:, groups] for codes in (got.T, want))
        losses = [losses_of(w, q, exact).sum() for q in numbers]
        assert losses[0] < (1 + tolerance) * losses[1]


def test_damping_grows_until_there_is_a_factor():
    singular = jnp.ones((K, K), jnp.float32) - 1e-4 * jnp.eye(K, dtype=jnp.float32)
    added = np.asarray(with_damping(singular, 0.0) - singular)
    assert 1e-4 < added[0, 0] < 1e-2
    assert np.isfinite(np.linalg.cholesky(np.asarray(with_damping(singular, 0.0), np.float64))).all()


def test_inputs_that_were_never_active_are_rounded_to_the_nearest():
    """And change nothing for the others."""
    rng = np.random.default_rng(2)
    w = rng.normal(size=(N, K)).astype(np.float32)
    hessian = hessian_of(K).astype(np.float32)
    dead = np.isin(np.arange(K), (3, 17, 39))
    hessian[dead], hessian[:, dead] = 0, 0
    method = Rounding(descent_passes=0)
    rounded = round_rows(w, hessian, "W4A8", method)
    nearest = round_rows(w, hessian, "W4A8", Rounding("nearest"))
    np.testing.assert_array_equal(rounded.codes[:, dead], nearest.codes[:, dead])
    np.testing.assert_array_equal(rounded.scale, nearest.scale)
    assert np.any(rounded.codes != nearest.codes)


def test_nested_codes_are_the_best_of_all_at_each_input():
    """Of 5 bits and their 3 high planes: the greedy choice, in float64 with sums over all errors so far."""
    w, hessian, step, base, groups = problem()
    step, base, dropped = step[:, groups] / 2, base[:, groups], np.array([0, 2])
    codes = np.arange(32)
    means = np.stack([codes >> d << d for d in dropped]) + (2.0 ** dropped[:, None] - 1) / 2
    reverse = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    feedback = reverse / np.diag(reverse)
    numbers, want = np.zeros((2, N, K)), np.zeros((N, K), int)
    for j in range(K):
        targets = w[:, j] + (w - numbers)[:, :, :j] @ feedback[:j, j]
        candidates = step[:, j, None] * means[:, None] + base[:, j, None]
        distance = np.sum((candidates - targets[..., None]) ** 2 / 2.0 ** dropped[:, None, None], axis=0)
        want[:, j] = distance.argmin(-1)
        numbers[:, :, j] = np.take_along_axis(candidates, np.stack([want[:, j, None]] * 2), -1)[..., 0]
    floats = [jnp.asarray(a.T, jnp.float32) for a in (w, step, base)]
    middle = jnp.stack([floats[1] * 0, floats[1] * 1.5], axis=1)
    grid = NestedGrid(floats[1], floats[2], middle, 31, (0, 2))
    rows = jnp.broadcast_to(floats[0][:, None], (K, 2, N))
    got = gptq(rows, jnp.asarray(hessian, jnp.float32), grid, jnp.arange(K), act_order=False, block=16)
    np.testing.assert_array_equal(got.T, want)
