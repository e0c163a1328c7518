"""What the docstring of `BipolarFormat` says always holds, encoding, truncation, and errors."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bipolar_jax import TERNARY, BipolarFormat
from bipolar_jax.format import as_format

BITS = range(1, 9)
FORMATS = [*(BipolarFormat(bits) for bits in BITS), TERNARY]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


@pytest.mark.parametrize("bits", BITS)
def test_grid_is_the_odd_integers_up_to_2_to_the_n_minus_1(bits):
    largest = 2**bits - 1
    np.testing.assert_array_equal(BipolarFormat(bits).grid(), range(-largest, largest + 1, 2))
    assert 0 not in BipolarFormat(bits).grid()


def test_ternary_grid_is_minus_2_0_2():
    assert TERNARY.grid().tolist() == [-2, 0, 2]
    assert TERNARY.plane_weights == (1, 1)
    assert TERNARY.max_value == 2


@pytest.mark.parametrize("bits", BITS)
def test_plane_weights_are_powers_of_two_low_plane_first(bits):
    assert BipolarFormat(bits).plane_weights == tuple(2**i for i in range(bits))


@every_format
def test_code_and_value_are_sums_over_planes(fmt):
    codes = np.arange(fmt.max_value + 1)
    bits = np.stack([np.asarray(fmt.bit(jnp.asarray(codes, jnp.uint8), plane)) for plane in range(fmt.bits)])
    weights = np.array(fmt.plane_weights)[:, None]
    assert set(np.unique(bits)) == {0, 1}
    np.testing.assert_array_equal((weights * bits).sum(0), codes)
    np.testing.assert_array_equal((weights * (2 * bits.astype(int) - 1)).sum(0), fmt.grid())


@every_format
def test_bits_keep_the_dtype_of_the_codes(fmt):
    assert fmt.bit(jnp.zeros(3, jnp.uint8), 0).dtype == jnp.uint8


@every_format
def test_values_of_codes_are_the_grid_in_order(fmt):
    values = fmt.values(jnp.arange(fmt.max_value + 1, dtype=jnp.uint8))
    assert values.dtype == jnp.int32
    np.testing.assert_array_equal(values, fmt.grid())
    np.testing.assert_array_equal(fmt.grid(), 2 * np.arange(fmt.max_value + 1) - fmt.max_value)


@every_format
def test_signed_codes_fit_int8_and_determine_the_value(fmt):
    codes = jnp.arange(fmt.max_value + 1, dtype=jnp.uint8)
    signed = fmt.signed_codes(codes)
    assert signed.dtype == jnp.int8
    np.testing.assert_array_equal(np.asarray(signed, int), np.arange(fmt.max_value + 1) - fmt.code_offset)
    assert fmt.value_shift in (0, 1)
    np.testing.assert_array_equal(2 * np.asarray(signed, int) + fmt.value_shift, fmt.grid())


@pytest.mark.parametrize("bits", BITS)
def test_signed_integers_of_n_bits_convert_without_loss(bits):
    """v = 2 c + 1 for c in -2^(n-1) ... 2^(n-1) - 1."""
    signed = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    fmt = BipolarFormat(bits)
    np.testing.assert_array_equal(fmt.values(jnp.asarray(signed + fmt.code_offset)), 2 * signed + 1)
    np.testing.assert_array_equal(fmt.signed_codes(jnp.asarray(signed + fmt.code_offset)), signed)


@every_format
def test_encode_finds_the_nearest_value(fmt):
    """Compares with a search over the grid; a point half-way between two values may be rounded to either."""
    scale = 0.25  # a power of two: everything below is exact
    x = np.linspace(-1.5, 1.5, 997, dtype=np.float32) * fmt.max_value * scale
    codes = np.asarray(fmt.encode(jnp.asarray(x), jnp.float32(0.5 / scale)))
    distance = np.abs(x[:, None] - scale * fmt.grid().astype(np.float64))
    np.testing.assert_array_equal(np.take_along_axis(distance, codes[:, None].astype(int), 1)[:, 0], distance.min(1))


@every_format
def test_encode_gives_every_grid_point_its_code(fmt):
    codes = fmt.encode(jnp.asarray(fmt.grid(), jnp.float32), jnp.float32(0.5))
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, np.arange(fmt.max_value + 1))


@every_format
def test_encode_clips_numbers_beyond_the_grid_and_infinities(fmt):
    x = jnp.array([-jnp.inf, -1e30, 1e30, jnp.inf], jnp.float32)
    assert fmt.encode(x, jnp.float32(0.5)).tolist() == [0, 0, fmt.max_value, fmt.max_value]


@every_format
def test_encode_at_scale_zero_gives_the_code_offset(fmt):
    assert fmt.encode(jnp.zeros(2), jnp.float32(0)).tolist() == [fmt.code_offset] * 2


@every_format
def test_encode_around_encodes_zero_as_the_given_code(fmt):
    for zero_code in range(0, fmt.max_value + 1, max(1, fmt.max_value // 7)):
        x = jnp.arange(-zero_code, fmt.max_value - zero_code + 1, dtype=jnp.float32)  # values are 2 scale = 1 apart
        codes = fmt.encode_around(zero_code, x, jnp.float32(1.0))
        np.testing.assert_array_equal(codes, np.arange(fmt.max_value + 1))


# On the coarser grid nothing is subnormal: XLA flushes that to zero, which lies between two cells.
_FAR_FROM_SUBNORMAL = st.floats(2**-100, 3, width=32) | st.floats(-3, -(2**-100), width=32) | st.just(0.0)


@given(
    bits=st.integers(1, 8),
    x=st.lists(_FAR_FROM_SUBNORMAL, min_size=1, max_size=20),
    scale=st.floats(2**-10, 2**10, width=32),
)
def test_top_planes_are_the_nearest_code_on_the_coarser_grid(bits, x, scale):
    """Nesting: doubling the scale is exact in floating point, and floor(floor(t) / 2) = floor(t / 2)."""
    x = jnp.asarray(x, jnp.float32) * scale
    half_steps = jnp.float32(0.5) / jnp.float32(scale)
    codes = np.asarray(BipolarFormat(bits).encode(x, half_steps))
    for fewer in range(1, bits + 1):
        dropped = bits - fewer
        coarser = BipolarFormat(bits).truncate(fewer).encode(x, half_steps / 2**dropped)
        np.testing.assert_array_equal(coarser, codes >> dropped)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(FORMATS, FORMATS)), ids=lambda fmt: fmt.name)
def test_max_contraction_is_the_largest_k_that_fits_int32(one, other):
    k = one.max_contraction(other)
    largest = one.max_value * other.max_value
    assert k * largest <= 2**31 - 1 < (k + 1) * largest
    assert k == other.max_contraction(one)


def test_max_contraction_of_8_by_8_bits():
    assert BipolarFormat(8).max_contraction(BipolarFormat(8)) == 33_025


@pytest.mark.parametrize("bits", BITS)
def test_truncated_formats_have_the_given_number_of_planes(bits):
    assert [BipolarFormat(bits).truncate(fewer).bits for fewer in range(1, bits + 1)] == list(range(1, bits + 1))


def test_names_are_the_numbers_of_the_precision_notation():
    assert [fmt.name for fmt in FORMATS] == ["1", "2", "3", "4", "5", "6", "7", "8", "1.58"]


def test_formats_compare_and_hash_by_value():
    assert BipolarFormat(np.int64(4)) == BipolarFormat(4) != BipolarFormat(5)
    assert BipolarFormat(2) != TERNARY
    assert len({BipolarFormat(np.int64(4)), BipolarFormat(4), TERNARY, BipolarFormat(2, ternary=True)}) == 2
    assert type(BipolarFormat(np.int64(4)).bits) is int


def test_as_format_takes_bits_or_a_format():
    assert as_format(3) == BipolarFormat(3)
    assert as_format(TERNARY) is TERNARY


@pytest.mark.parametrize("bits", [0, 9, -1, True, False, 2.0, 2.5, "4", None])
def test_errors_of_bits_name_the_value(bits):
    with pytest.raises(ValueError, match=rf"from 1 to 8, got {bits!r}"):
        BipolarFormat(bits)


def test_a_ternary_format_needs_two_planes():
    with pytest.raises(ValueError, match=r"bits=3: use bipolar_jax\.TERNARY"):
        BipolarFormat(3, ternary=True)


@pytest.mark.parametrize(
    ("fmt", "bits", "message"),
    [
        (BipolarFormat(4), 5, r"cannot truncate 4 bits to 5: ask for at most 4"),
        (BipolarFormat(4), 0, r"from 1 to 8, got 0"),
        (BipolarFormat(4), 2.5, r"from 1 to 8, got 2\.5"),
        (TERNARY, 1, r"quantize again"),
    ],
)
def test_truncation_errors(fmt, bits, message):
    with pytest.raises(ValueError, match=message):
        fmt.truncate(bits)
