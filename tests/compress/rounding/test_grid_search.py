"""The search for float grids against the same steps in plain float64, and what it promises."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.compress.rounding.grid_search import Codes, search_grid
from bipolar_jax.quantize.groups import split_groups, valid_mask

N, K, SIZE = 8, 50, 24
rng = np.random.default_rng(4)
X = rng.standard_t(4, size=(N, K)).astype(np.float32)
X[1, :SIZE] = 0.5  # constant
X[2] = 0
X[3] = np.abs(X[3]) + 1
WEIGHTS = rng.uniform(0.1, 3, K).astype(np.float32)


def found(fmt, kind, weights=None):
    grouped = split_groups(jnp.asarray(X), SIZE)
    weights = None if weights is None else split_groups(jnp.asarray(weights), SIZE)
    kind = "symmetric" if fmt.bits == 1 and kind == "zero_point" else kind  # one bit has no zero
    step, base, zero = search_grid(grouped, valid_mask(K, SIZE), Codes.of(fmt), kind, weights)
    return *(np.asarray(a, np.float64) for a in (step, base)), zero


def error_of(x, step, base, weights, largest) -> float:
    codes = np.clip(np.floor((x - base) / step + 0.5), 0, largest) if step > 0 else 0
    return float(np.sum(weights * (step * codes + base - x) ** 2))


def plain_search(x, weights, largest, least, steps, kind) -> tuple[float, float]:
    """A group at a time: shrink, then fit scale and offset to codes eight times."""
    low, high = x.min(), x.max()
    if kind == "zero_point":
        low, high = min(low, 0.0), max(high, 0.0)
    elif kind == "symmetric":
        low, high = -np.abs(x).max(), np.abs(x).max()
    widest = (high - low) / largest
    zero = {"zero_point": np.round(-low / widest) if widest else 0, "symmetric": largest / 2}.get(kind)
    middle = (low + high) / 2
    best = np.inf
    for factor in np.linspace(1, least, steps + 1):
        step = widest * factor
        base = middle - step * largest / 2 if zero is None else -step * zero
        error = error_of(x, step, base, weights, largest)
        if error < best:
            best, chosen = error, (step, base)
    step, base = chosen
    for _ in range(8):
        codes = np.clip(np.floor((x - base) / step + 0.5), 0, largest)
        if zero is None:
            design = np.stack([codes, np.ones_like(codes)], axis=1)
            step, base = np.linalg.lstsq(np.sqrt(weights)[:, None] * design, np.sqrt(weights) * x, rcond=None)[0]
        else:
            step = np.sum(weights * (codes - zero) * x) / np.sum(weights * (codes - zero) ** 2)
            base = -step * zero
    return step, base


@pytest.mark.parametrize("kind", ["free", "zero_point", "symmetric"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_the_grid_is_that_of_the_plain_search(kind, weights):
    """For 3 bits; of near candidates either may win, so errors are compared."""
    step, base, zero = found(BipolarFormat(3), kind, weights)
    assert (zero is None) == (kind == "free")
    weights = np.ones(K) if weights is None else weights.astype(np.float64)
    for row in (0, 3, 4, 5, 6, 7):
        for group in range(3):
            part = slice(group * SIZE, (group + 1) * SIZE)
            x, weight = X[row, part].astype(np.float64), weights[part]
            want = error_of(x, *plain_search(x, weight, 7, 0.35, 28, kind), weight, 7)
            got = error_of(x, step[row, group], base[row, group], weight, 7)
            assert abs(got - want) <= 0.02 * want + 1e-12


@pytest.mark.parametrize("fmt", [BipolarFormat(1), TERNARY, BipolarFormat(4)], ids=lambda fmt: fmt.name)
def test_what_holds_for_every_format(fmt):
    """Constant groups and zeros are exact; zero stays on its grid; a free grid is at least as good as a symmetric."""
    free, zero_point, symmetric = (found(fmt, kind) for kind in ("free", "zero_point", "symmetric"))
    for step, base, _ in (free, zero_point, symmetric):
        assert step.min() >= 0
        np.testing.assert_array_equal(step[2], 0)
        np.testing.assert_array_equal(base[2], 0)
    assert (free[0][1, 0], free[1][1, 0]) == (0, 0.5)
    zero = np.asarray(zero_point[2])
    if fmt.bits > 1:
        np.testing.assert_array_equal(zero, np.round(zero))
        assert np.all((zero >= 0) & (zero <= fmt.max_value))
    else:
        np.testing.assert_array_equal(zero, 0.5)
    np.testing.assert_allclose(zero_point[1], -zero_point[0] * zero, rtol=1e-6)
    errors = [
        sum(error_of(X[r, g * SIZE :][:SIZE], s[r, g], b[r, g], 1.0, fmt.max_value) for r in range(N) for g in range(3))
        for s, b, _ in (free, symmetric)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind", ["free", "zero_point", "symmetric"])
def test_a_grid_of_several_precisions_clips_for_the_fewest_bits(kind):
    """Of normal numbers; each precision takes its nearest number, the mean of 2^d codes."""
    x = np.random.default_rng(0).normal(size=(32, 576)).astype(np.float32)
    fmt, errors = BipolarFormat(8), []
    for dropped in (0,), (0, 2, 4):
        codes = Codes.of(fmt, dropped[-1])
        step, base, _ = search_grid(x[:, None], valid_mask(576, 576), codes, kind, None, dropped)
        step, base = np.asarray(step, np.float64), np.asarray(base, np.float64)
        errors.append([])
        for d in (0, 2, 4):
            high = np.clip(np.floor(((x - base) / step + 0.5) / 2**d), 0, fmt.max_value >> d)
            errors[-1].append(np.mean((step * (2**d * high + (2**d - 1) / 2) + base - x) ** 2))
    of_all_planes, of_all_precisions = np.array(errors)
    assert of_all_precisions[2] < 0.95 * of_all_planes[2]
    assert of_all_precisions[0] < 0.02 * of_all_precisions[2]
