"""`round_rows` as a whole: every format, odd sizes, what its results can be used for, and errors."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import Precision, from_codes
from bipolar_jax.compress.rounding import Rounding, round_rows
from bipolar_jax.compress.rounding.grids import IntegerGrid
from bipolar_jax.compress.rounding.round_rows import _nested
from bipolar_jax.format import as_format
from tests.compress.rounding.problems import hessian_of, losses_of

N, K = 12, 72
rng = np.random.default_rng(5)
W = rng.normal(size=(N, K)).astype(np.float32)
W[3] = 0
W[4] *= 1e-30
W[5] *= 1e30
W[6, :32] = 0
OTHERS = [0, 1, 2, 7, 8, 9, 10, 11]  # of comparable losses
HESSIAN = hessian_of(K)
FORMATS = ["W1A8", "W1.58A8", "W4A8", "W8A8", "W3A16g32", "W1A8g32", "W1.58A8g32", "W2A8g32", "W4A8g32", "W6A8g32"]


def numbers_of(rounded, precision) -> np.ndarray:
    """As the packed array has them."""
    precision = Precision.of(precision)
    packed = from_codes(
        rounded.codes, precision.w_bits, -1, rounded.scale, rounded.offset, precision.group_size, rounded.groups
    )
    numbers = np.asarray(packed.dequantize(), np.float64)
    own = rounded.numbers(as_format(precision.w_bits), precision.group_size)
    np.testing.assert_allclose(own, numbers, rtol=1e-5, atol=1e-6 * np.abs(numbers).max())
    return numbers


@pytest.mark.sample(2)
@pytest.mark.parametrize("precision", FORMATS)
def test_losses_fall_from_nearest_to_gptq_to_descent(precision):
    """And rows of zeros stay zeros, whatever the scale of the others; the last group is short."""
    methods = Rounding("nearest"), *(Rounding(descent_passes=passes) for passes in (0, 1, 3))
    losses = []
    for method in methods:
        numbers = numbers_of(round_rows(W, HESSIAN.astype(np.float32), precision, method), precision)
        np.testing.assert_array_equal(numbers[3], 0)
        units = np.array([1e-30, 1e30])[:, None]
        assert np.all(losses_of(W[4:6] / units, numbers[4:6] / units, HESSIAN) < losses_of(W[:2], 0, HESSIAN).max())
        losses.append(losses_of(W[OTHERS], numbers[OTHERS], HESSIAN + 0.01 * np.eye(K)).sum())
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("grid", ["zero_point", "symmetric"])
def test_grids_keep_their_zero(grid):
    rounded = round_rows(W, HESSIAN.astype(np.float32), "W4A8g32f", Rounding(grid=grid))
    if grid == "symmetric":
        assert rounded.offset is None
    else:
        values = -np.asarray(rounded.offset, np.float64)[OTHERS] / np.asarray(rounded.scale)[OTHERS]
        np.testing.assert_allclose(values, 2 * np.round((values + 15) / 2) - 15, atol=1e-4)
        integers = round_rows(W, HESSIAN.astype(np.float32), "W4A8g32", Rounding(grid=grid)).groups
        np.testing.assert_array_equal(np.asarray(integers.offset, int)[OTHERS] % np.asarray(integers.scale)[OTHERS], 0)
    nearest = round_rows(W, None, "W4A8g32f", Rounding("nearest", grid=grid))
    errors = [losses_of(W[OTHERS], numbers_of(r, "W4A8g32f")[OTHERS], HESSIAN).sum() for r in (nearest, rounded)]
    assert errors[1] < errors[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("n", "k"), [(1, 5), (3, 1), (1, 1)])
@pytest.mark.parametrize("precision", ["W4A8", "W2A8g1", "W2A8g1f"])
def test_one_row_and_one_input(n, k, precision):
    w = W[:n, :k]
    numbers = numbers_of(round_rows(w, np.eye(k, dtype=np.float32), precision), precision)
    np.testing.assert_allclose(numbers, w, atol=0.1)


def test_weights_of_the_grid_are_the_hessians_diagonal():
    """In float and in integer groups."""
    scales = np.where(np.arange(K) % 2, 10.0, 0.1)
    hessian = np.diag(scales).astype(np.float32)
    for precision in ("W3A8g32f", "W3A8g32"):
        plain, weighted = (
            numbers_of(round_rows(W, hessian, precision, Rounding("nearest", weighted_grid=on)), precision)[OTHERS]
            for on in (False, True)
        )
        losses = [losses_of(W[OTHERS], q, hessian).sum() for q in (plain, weighted)]
        assert losses[1] < 0.95 * losses[0]


def test_asymmetric_targets_make_up_for_other_inputs():
    """sum (q x~ - w x)^2 over the tokens falls; where the inputs are the same nothing changes."""
    x = rng.normal(size=(400, K)) @ rng.normal(size=(K, K))
    of_quantized = 0.8 * x + 0.5 * rng.normal(size=x.shape)
    hessian, cross = (of_quantized.T @ a / len(x) for a in (of_quantized, x))

    def error(asymmetry, cross):
        method = Rounding(asymmetry=asymmetry, damping=1e-4)
        rounded = round_rows(W, hessian.astype(np.float32), "W4A8", method, cross.astype(np.float32))
        numbers = numbers_of(rounded, "W4A8")
        return numbers, np.mean((of_quantized @ numbers[OTHERS].T - x @ W[OTHERS].T) ** 2)

    errors = [error(asymmetry, cross)[1] for asymmetry in (0.0, 0.5, 1.0)]
    assert errors[2] < errors[1] < errors[0]
    # w' = w sum x x~^T (sum x~ x~^T)^-1 is the best of all; the rest is rounding's.
    best = W[OTHERS] @ cross.T @ np.linalg.inv(hessian)
    assert errors[2] < 2 * np.mean((of_quantized @ best.T - x @ W[OTHERS].T) ** 2)
    same = [error(asymmetry, hessian)[0][OTHERS] for asymmetry in (0.0, 1.0)]
    np.testing.assert_allclose(*same, atol=1e-4)


def test_high_planes_of_nested_codes_serve_fewer_bits():
    """Beside planes dropped of 8 bits that were rounded to the nearest: 4 bits lose half, 8 bits up to twice."""
    hessian = HESSIAN.astype(np.float32)
    methods = Rounding("nearest"), Rounding(descent_passes=0, nested=(6, 4)), Rounding(nested=(6, 4))
    losses = []
    for method in methods:
        rounded = round_rows(W, hessian, "W8A8", method)
        packed = from_codes(rounded.codes, 8, -1, rounded.scale, rounded.offset)
        arrays = packed, packed.truncate(6), packed.truncate(4)
        losses.append([losses_of(W[OTHERS], a.dequantize()[np.array(OTHERS)], HESSIAN).sum() for a in arrays])
    nearest, greedy, descended = np.array(losses)
    weights = np.array([1, 1 / 4, 1 / 16])
    assert descended @ weights < greedy @ weights < nearest @ weights
    assert descended[2] < 0.5 * nearest[2]
    assert descended[1] < nearest[1]
    assert descended[0] < 2 * nearest[0]
    rounded = round_rows(W, hessian, "W8A8", Rounding(nested=(6, 4), nested_decay=0.0))
    packed = from_codes(rounded.codes, 8, -1, rounded.scale, rounded.offset)
    even = [losses_of(W[OTHERS], a.dequantize()[np.array(OTHERS)], HESSIAN).sum() for a in (packed, packed.truncate(4))]
    assert even[1] < 0.95 * descended[2]
    assert descended[0] < even[0] < 0.1 * even[1]


def test_high_planes_of_integer_groups_serve_fewer_bits():
    """The numbers that are rounded to are those of `truncate`, whose middles are integers; 4 of 6 bits lose less."""
    hessian, precision = HESSIAN.astype(np.float32), Precision.parse("W6A8g24")
    losses = []
    for method in Rounding("nearest"), Rounding(nested=(4, 3)):
        rounded = round_rows(W, hessian, precision, method)
        packed = from_codes(rounded.codes, 6, -1, rounded.scale, None, 24, rounded.groups)
        truncated = {bits: packed.truncate(bits).dequantize()[np.array(OTHERS)] for bits in (6, 4, 3)}
        losses.append([losses_of(W[OTHERS], a, HESSIAN).sum() for a in truncated.values()])
    (six, four, three), nested = losses
    assert nested[0] < 2 * six
    assert nested[1] < 0.7 * four
    assert nested[2] < 0.7 * three
    integers = (a.T.astype(jnp.float32) for a in (rounded.groups.scale, rounded.groups.offset))
    grid = IntegerGrid(rounded.scale[:, 0], *integers, 63, False)
    _, of_planes = _nested(jnp.asarray(W.T), grid, 24, 63, (0, 2, 3), 1.0)
    numbers = of_planes.numbers(rounded.codes.T)
    for index, bits in enumerate((6, 4, 3)):
        np.testing.assert_allclose(numbers[:, index].T[np.array(OTHERS)], truncated[bits], atol=1e-5)


def test_rows_depend_on_no_others_nor_on_the_hessians_scale():
    hessian = HESSIAN.astype(np.float32)
    together = round_rows(W, hessian, "W4A8")
    apart = [round_rows(part, 4 * hessian, "W4A8") for part in np.split(W, 2)]
    np.testing.assert_array_equal(together.codes, np.concatenate([each.codes for each in apart]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": W[0]}, r"shape \(72,\): expected \[outputs, inputs\]"),
        ({"hessian": None}, "needs hessian, got None"),
        ({"hessian": np.eye(3, dtype=np.float32)}, r"shape \(3, 3\): rows of 72 inputs need \(72, 72\)"),
        ({"rows": np.full_like(W, np.nan)}, "NaN"),
        ({"method": Rounding(asymmetry=1.0)}, "needs cross, got None"),
        ({"method": Rounding(grid="symmetric"), "precision": "W4A8g32"}, "not one of integer groups, as of W4A8g32"),
        ({"method": Rounding(nested=(1,)), "precision": "W1.58A8"}, "codes of a ternary format have no high planes"),
        ({"method": Rounding(nested=(4,))}, r"fewer bits than W4A8, got \(4,\)"),
        ({"precision": "W4A8g100"}, "from 1 to the contracted size 72"),
    ],
)
def test_errors_of_round_rows(arguments, message):
    arguments = {"rows": W, "hessian": HESSIAN.astype(np.float32), "precision": "W4A8"} | arguments
    with pytest.raises(ValueError, match=message):
        round_rows(**arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"algorithm": "awq"}, "algorithm must be one of nearest, gptq, got 'awq'"),
        ({"grid": "log"}, "grid must be one of free"),
        ({"descent_passes": -1}, "at least 0, got -1"),
        ({"block": 0}, "at least 1, got 0"),
        ({"damping": float("nan")}, "damping must be finite"),
        ({"nested": (4, 6)}, "falling numbers of bits"),
        ({"nested": 4}, "falling numbers of bits"),
        ({"nested_decay": -1.0}, "nested_decay must be from 0 to 2, got -1.0"),
        ({"damping": "0.01"}, "damping must be finite"),
        ({"act_order": "no"}, "act_order must be True or False"),
        ({"nested": (4,), "algorithm": "nearest"}, "one target for a weight"),
        ({"asymmetry": 2.0}, "asymmetry must be from 0 to 1"),
    ],
)
def test_errors_of_the_method(fields, message):
    with pytest.raises(ValueError, match=message):
        Rounding(**fields)
