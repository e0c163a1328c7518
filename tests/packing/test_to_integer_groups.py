"""`BipolarArray.to_integer_groups`: the codes stay, the error is the least one and the one that is stated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarArray, BipolarFormat, from_codes, quantize
from bipolar_jax.quantize.integer_groups import largest_scale
from tests.support.integer_products import normal, packed_in_integer_groups, random_codes

# Rows of every kind: normal, heavy tails, constant, zeros, a group of zeros, one outlier, far from zero, tiny, huge,
# and more normal ones. The last group is short. Conversions compile for a second for every format and shape, so tests
# share them.
N, K, GROUP = 16, 200, 64
ROWS = normal(N, K)
ROWS[1] = np.random.default_rng(1).standard_t(3, K)
ROWS[2] = 0.3
ROWS[3] = 0
ROWS[4, GROUP : 2 * GROUP] = 0
ROWS[5, 7] = 100
ROWS[6] += 50
ROWS[7] *= 1e-36
ROWS[8] *= 1e36
ZEROS, ALIKE = 3, [0, *range(9, N)]  # the row of zeros, and normal ones

every_format = pytest.mark.parametrize(
    "fmt", [BipolarFormat(4), TERNARY, BipolarFormat(1), BipolarFormat(6)], ids=lambda fmt: fmt.name
)


# Within a trace no numbers are refused.
traced = jax.jit(lambda w: w.to_integer_groups())


def in_float_groups(fmt: BipolarFormat) -> BipolarArray:
    return quantize(ROWS, fmt, -1, GROUP, scales="float")


def squares(x) -> np.ndarray:
    """Sums over rows in float64, in units of each row's largest number."""
    return np.sum(np.square(np.asarray(x, np.float64)), axis=-1)


def least_errors(w: BipolarArray, row_scale: np.ndarray) -> np.ndarray:
    """For given row scales, the least squared error of every row over all s, in float64 from the definition.

    For one s the error is a parabola in o, so the nearest integer in the range is the best one.
    """
    top, largest = largest_scale(w.format), w.format.max_value
    codes = np.asarray(w.codes(), np.float64)
    numbers = np.asarray(w.dequantize(), np.float64)
    total = np.zeros(len(codes))
    s = np.arange(1, top + 1)[:, None, None]
    for start in range(0, codes.shape[1], w.group_size):
        u, x = codes[:, start : start + w.group_size], numbers[:, start : start + w.group_size] / row_scale
        o = np.clip(np.round(np.mean(x - s * u, axis=-1, keepdims=True)), -128, 127 - largest * s)
        total += np.sum((s * u + o - x) ** 2, axis=-1).min(axis=0) * row_scale[:, 0] ** 2
    return total


@every_format
@pytest.mark.sample(2)
def test_codes_stay_and_the_stated_error_is_that_of_the_numbers(fmt):
    floats = in_float_groups(fmt)
    w, error = floats.to_integer_groups()
    w.check()
    w.groups.check(fmt, (N, 4))
    np.testing.assert_array_equal(w.planes, floats.planes)
    assert (w.offset, w.scale.shape, w.scale.dtype) == (None, (N, 1), jnp.float32)
    np.testing.assert_array_equal(w.row_sums, np.asarray(w.values()).sum(-1, keepdims=True))
    np.testing.assert_array_equal(w.dequantize()[ZEROS], 0)
    assert w.scale[ZEROS, 0] == 0
    np.testing.assert_array_equal(w.groups.scale[ZEROS], 1)
    numbers = np.asarray(floats.dequantize(), np.float64)
    difference = squares(w.dequantize() - numbers)
    np.testing.assert_allclose(error, difference.sum() / squares(numbers).sum(), rtol=1e-3)
    assert (difference[ALIKE] < {4: 1e-3, 2: 1e-4, 1: 1e-4, 6: 0.02}[fmt.bits] * squares(numbers[ALIKE])).all()
    # Steps differ by half a row scale at most where nothing is clipped, and offsets too.
    moved = np.abs(w.dequantize() - numbers)[ALIKE] / np.asarray(w.scale)[ALIKE]
    assert moved.max() <= fmt.max_value / 2 + 1


@every_format
@pytest.mark.sample(2)
def test_the_error_is_the_least_one(fmt):
    """Of its row scale over all s and o; and over a fine search of row scales, but for a few percent."""
    floats = in_float_groups(fmt)
    w, _ = floats.to_integer_groups()
    keep = lambda leaf: leaf[..., np.asarray(ALIKE), :]  # noqa: E731 - the rows, next to last in every leaf
    floats, w = jax.tree.map(keep, floats), jax.tree.map(keep, w)
    scale = np.asarray(w.scale, np.float64)
    found = squares(np.asarray(w.dequantize(), np.float64) - np.asarray(floats.dequantize(), np.float64))
    np.testing.assert_allclose(found, least_errors(floats, scale), rtol=1e-4)
    finest = np.min([least_errors(floats, scale * factor) for factor in np.linspace(0.6, 1.6, 101)], axis=0)
    assert found.sum() <= 1.1 * finest.sum()


@every_format
@pytest.mark.sample(2)
def test_grids_that_integers_have_are_found(fmt):
    """Exactly, if the products of row scales and integers are exact; else to the rounding of the floats."""
    integers = packed_in_integer_groups(random_codes(fmt, N, K, 0), fmt, GROUP, 1).T
    short = jnp.asarray(integers.scale, jnp.bfloat16).astype(jnp.float32)
    for scale in (short, integers.scale):
        expected = dataclasses.replace(integers, scale=scale).dequantize()
        grid = integers.groups.float_grid(scale, fmt)
        w, error = from_codes(integers.codes(), fmt, -1, *grid, group_size=GROUP).to_integer_groups()
        if scale is short:
            assert error == 0
            np.testing.assert_array_equal(w.dequantize(), expected)
        else:
            assert error < 1e-13
            np.testing.assert_allclose(w.dequantize(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 1.04, 1.06), (3, 1, 1.004), (5, 1.8, 2), (6, 17, 20)])
@pytest.mark.sample(1)
def test_rounding_weighs_more_than_the_conversion_up_to_4_bits(bits, least, most):
    """The squared error of normal weights with integer groups, relative to float ones; at 4 bits zero stays near."""
    x = normal(64, 576)
    floats = quantize(x, bits, -1, 64, scales="float")
    w, _ = floats.to_integer_groups()
    ratio = squares(w.dequantize() - x).sum() / squares(floats.dequantize() - x).sum()
    assert least < ratio < most
    zero_code = (floats.format.max_value - floats.offset / floats.scale) / 2
    zero = w.scale * (w.groups.scale.astype(jnp.float32) * zero_code + w.groups.offset.astype(jnp.float32))
    if bits <= 4:
        assert jnp.abs(zero / (2 * floats.scale)).max() < 0.1


def test_a_stack_has_the_numbers_of_its_matrices_and_an_error_for_each():
    floats = in_float_groups(BipolarFormat(4))
    w, error = floats.to_integer_groups()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[..., ::-1, :]]), floats)
    for converted, errors in (stack.to_integer_groups(), jax.vmap(traced)(stack)):
        assert errors.shape == (2,)
        np.testing.assert_allclose(errors, [error, error], rtol=1e-5)
        numbers = np.asarray(w.dequantize())
        np.testing.assert_allclose(converted.dequantize(), np.stack([numbers, numbers[::-1]]), rtol=1e-5)
    transposed, _ = floats.T.to_integer_groups()
    np.testing.assert_array_equal(transposed.dequantize(), w.dequantize().T)


def test_integer_groups_stay():
    w = packed_in_integer_groups(random_codes(TERNARY, 5, 64, 0), TERNARY, 32, 0)
    same, error = w.to_integer_groups()
    assert same is w
    assert error == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("leaf", ["scale", "offset"])
def test_scales_that_no_integers_stand_for(bad, leaf):
    """Refused, and in traced arrays NaN in their row. Offsets below zero are as good as others."""
    floats = in_float_groups(BipolarFormat(4))
    floats = dataclasses.replace(floats, **{leaf: getattr(floats, leaf).at[0, 1].set(bad)})
    if (leaf, bad) == ("offset", -1.0):
        assert np.isfinite(floats.to_integer_groups()[1])
        return
    with pytest.raises(ValueError, match="scales go down to -1" if bad == -1 else f"the array of {leaf}s has 1 NaN or"):
        floats.to_integer_groups()
    w, error = traced(floats)
    assert np.isnan(error)
    assert np.isnan(w.scale[0, 0])
    w.groups.check(floats.format, (N, 4))
    expected, _ = traced(in_float_groups(BipolarFormat(4)))
    np.testing.assert_array_equal(w.dequantize()[1:], expected.dequantize()[1:])


@pytest.mark.parametrize(
    ("bits", "group_size", "message"), [(4, None, "no groups: its products need"), (7, 64, "1 to 6 bits, got 7")]
)
def test_arrays_without_integer_groups_are_refused(bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantize(ROWS, bits, -1, group_size).to_integer_groups()
