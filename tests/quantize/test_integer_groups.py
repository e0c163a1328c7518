"""Integer groups: the laws of `IntegerGroups`, and the error of those that `quantize` finds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarFormat, Precision, fake_quant, quantize
from bipolar_jax.packing import pack
from bipolar_jax.quantize import groups as groups_module
from bipolar_jax.quantize.calibration import default_calibration
from bipolar_jax.quantize.integer_groups import IntegerGroups, largest_scale, max_contraction
from tests.support.integer_products import normal

# The search compiles for 2 seconds for every format and shape, so tests share them.
FORMATS = [*(BipolarFormat(bits) for bits in (1, 2, 3, 4)), TERNARY]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)

# Rows of every kind: normal, heavy tails, constant, zeros, a group of zeros, one outlier, far from zero, tiny, huge,
# and more normal ones. The last group is short.
N, K, GROUP = 32, 200, 64
rng = np.random.default_rng(0)
ROWS = rng.normal(size=(N, K)).astype(np.float32)
ROWS[1] = rng.standard_t(3, K)
ROWS[2] = 0.3
ROWS[3] = 0
ROWS[4, GROUP : 2 * GROUP] = 0
ROWS[5, 7] = 100
ROWS[6] += 50
ROWS[7] *= 1e-37
ROWS[8] *= 1e36
TINY = 7


def squared_error(x: np.ndarray, *arguments, **options) -> float:
    return float(np.sum((np.asarray(quantize(x, *arguments, **options).dequantize(), np.float64) - x) ** 2))


@every_format
def test_every_code_of_every_group_has_an_int8_value(fmt):
    """The range is that of the grid, present or not; scales are at least 1, for ternary at most 127."""
    groups = quantize(ROWS, fmt, -1, GROUP, scales="integer").groups
    scale, offset = np.asarray(groups.scale, int), np.asarray(groups.offset, int)
    assert scale.min() >= 1
    assert scale.max() <= largest_scale(fmt) == (127 if fmt.ternary else 255 // fmt.max_value)
    assert offset.min() >= -128
    assert (offset + scale * fmt.max_value).max() <= 127


@every_format
def test_rows_and_groups_of_zeros_have_scale_one_and_decode_to_zeros(fmt):
    w = quantize(ROWS, fmt, -1, GROUP, scales="integer")
    assert w.scale[3, 0] == 0
    np.testing.assert_array_equal(w.groups.scale[3], 1)
    np.testing.assert_array_equal(w.values()[3], 0)
    assert w.scale[4, 0] > 0
    assert w.groups.scale[4, 1] == 1
    np.testing.assert_array_equal(w.values()[4, GROUP : 2 * GROUP], 0)


@every_format
def test_numbers_are_rounded_to_the_nearest_value_of_their_group(fmt):
    w = quantize(ROWS, fmt, -1, GROUP, scales="integer")
    scale, offset = (
        np.repeat(np.asarray(a, np.float64), GROUP, axis=1)[:, :K, None] for a in (w.groups.scale, w.groups.offset)
    )
    grid = np.asarray(w.scale, np.float64)[..., None] * (scale * np.arange(fmt.max_value + 1) + offset)
    nearest = np.abs(grid - ROWS[..., None]).min(-1)
    got = np.abs(np.asarray(w.dequantize(), np.float64) - ROWS)
    others = np.arange(len(ROWS)) != TINY  # whose numbers are subnormal beside their scale
    assert np.all((got - nearest)[others] <= 1e-5 * np.abs(ROWS[others]).max(axis=1, keepdims=True))


@every_format
def test_zero_stays_on_the_grid_where_the_calibration_puts_it_there(fmt):
    if default_calibration(fmt) != "minmax":
        return
    groups = quantize(ROWS, fmt, -1, GROUP, scales="integer").groups
    scale, offset = np.asarray(groups.scale, int), np.asarray(groups.offset, int)
    np.testing.assert_array_equal(-offset % scale, 0)
    assert np.all((-offset // scale >= 0) & (-offset // scale <= fmt.max_value))


@pytest.mark.parametrize(("bits", "calibration"), [(4, "minmax"), (3, "minmax"), (2, "mse")])
def test_squared_error_is_below_that_of_float_scales(bits, calibration):
    """Of the default calibration; on normal numbers, and on heavy tails (Student's t with 5 degrees of freedom)."""
    for x in (normal(N, K, seed=1), np.random.default_rng(1).standard_t(5, (N, K)).astype(np.float32)):
        floats = squared_error(x, bits, -1, GROUP, calibration, scales="float")
        assert squared_error(x, bits, -1, GROUP, scales="integer") < floats


def test_a_stack_has_the_numbers_of_its_rows():
    stack = quantize(ROWS[:30].reshape(3, 10, K), 4, -1, GROUP, scales="integer")
    rows = quantize(ROWS, 4, -1, GROUP, scales="integer")
    assert stack.groups.scale.shape == (3, 10, 4)
    np.testing.assert_array_equal(stack.dequantize().reshape(30, K), rows.dequantize()[:30])


def test_blocks_of_rows_give_what_all_rows_give(monkeypatch):
    monkeypatch.setattr(groups_module, "_BLOCK_NUMBERS", 5 * K)
    sums, rows = groups_module.in_blocks(lambda block: (block.sum(-1), block), jnp.asarray(ROWS))
    np.testing.assert_array_equal(rows, ROWS)
    assert sums.shape == (N,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_with_nan_or_inf_become_nan(bad):
    """As in a traced array, whose numbers `quantize` cannot check."""
    x = ROWS.copy()
    x[1, 3] = bad
    numbers = pack._round_and_pack(jnp.asarray(x), BipolarFormat(4), -1, GROUP, "minmax", "integer").dequantize()
    assert np.isnan(numbers[1]).all()
    others = np.arange(N) != 1
    np.testing.assert_array_equal(numbers[others], quantize(ROWS, 4, -1, GROUP, scales="integer").dequantize()[others])


def test_the_bound_on_k_is_65793_for_8_bits():
    assert max_contraction(BipolarFormat(8)) == 65_793
    assert 65_793 * 255 * 128 < 2**31 <= 65_794 * 255 * 128


@pytest.mark.parametrize("bits", range(2, 7))
def test_dropping_planes_moves_numbers_by_at_most_half_a_row_scale(bits):
    fmt = BipolarFormat(bits)
    scale = np.arange(1, largest_scale(fmt) + 1, dtype=np.uint8)
    for offset in (np.full(len(scale), -128), 127 - fmt.max_value * scale.astype(int)):
        groups = IntegerGroups(scale[:, None], offset.astype(np.int8)[:, None])
        values = scale[:, None] * np.arange(fmt.max_value + 1) + offset[:, None]
        for dropped in range(1, bits):
            shorter = groups.without_planes(dropped)
            shorter.check(BipolarFormat(bits - dropped), (len(scale), 1))
            nested = values.reshape(len(scale), -1, 2**dropped).mean(-1)
            short_values = shorter.scale.astype(int) * np.arange(2 ** (bits - dropped)) + shorter.offset
            assert set(np.unique(nested - short_values)) <= {0, 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, "1 to 6 bits, got 7"),
        ({"group_size": None}, "got group_size None: give a group_size"),
        ({"scales": "int"}, "must be one of float, integer, got 'int'"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    arguments = {"bits": 4, "group_size": 64, "scales": "integer"} | arguments
    with pytest.raises(ValueError, match=message):
        quantize(ROWS, axis=-1, **arguments)
    with pytest.raises(ValueError, match=message):
        Precision(arguments["bits"], 8, arguments["group_size"], scales=arguments["scales"])


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("W4A8g64", "integer"),
        ("W6A8g20", "integer"),
        ("W1.58A4g32", "integer"),
        ("W4A16g64", "integer"),
        ("W4A8g64f", "float"),
        ("W4A16g64f", "float"),
        ("W7A8g64", "float"),
        ("W4A8", "float"),
    ],
)
def test_the_text_of_a_precision_round_trips(text, scales):
    precision = Precision.parse(text)
    assert str(precision) == text
    assert Precision.parse(str(precision)) == precision
    assert precision.scales == scales


def test_groups_of_1_to_6_bits_have_integer_scales_unless_another_kind_is_named():
    for bits, expected in ((6, True), (7, False)):
        assert quantize(ROWS, bits, -1, 64).has_integer_groups == expected
    assert not quantize(ROWS, 4, -1, 64, scales="float").has_integer_groups
    np.testing.assert_array_equal(fake_quant(ROWS, 4, -1, 64), fake_quant(ROWS, 4, -1, 64, scales="integer"))


def test_a_text_names_either_kind():
    assert Precision.parse("W4A8g64f") == Precision(4, 8, 64, scales="float") != Precision.parse("W4A8g64")
    assert Precision.parse("W4A8g64i") == Precision(4, 8, 64)
    for text in ("W4A8f", "W4A8i", "W4A8gi", "W4A8g64x"):
        with pytest.raises(ValueError, match="not of the form"):
            Precision.parse(text)
