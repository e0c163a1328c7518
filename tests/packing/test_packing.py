"""`BipolarArray`: the statements of its docstring, `quantize` and `from_codes`, truncation, errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bipolar_jax import TERNARY, BipolarFormat, from_codes, quantize
from bipolar_jax.packing.words import num_words, pack_codes, unpack_codes
from tests.support.integer_products import normal

FORMATS = [*(BipolarFormat(bits) for bits in range(1, 9)), TERNARY]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
SIZES = [1, 31, 32, 33, 64, 100]


def random_codes(fmt: BipolarFormat, *shape: int) -> np.ndarray:
    return np.random.default_rng(shape[-1]).integers(0, fmt.max_value + 1, shape, np.uint8)


def numpy_planes(codes: np.ndarray, fmt: BipolarFormat) -> np.ndarray:
    """Planes by numpy.packbits: bit b of the little-endian 32-bit word w is element 32 w + b."""
    planes = []
    for plane in range(fmt.bits):
        bits = codes > plane if fmt.ternary else (codes >> plane) & 1
        padded = np.pad(bits, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 32)])
        planes.append(np.packbits(padded, axis=-1, bitorder="little").view("<u4"))
    return np.stack(planes, axis=-3)


@every_format
def test_planes_are_those_of_numpy_packbits(fmt):
    for k in SIZES:
        codes = random_codes(fmt, 3, k)
        planes = pack_codes(jnp.asarray(codes), fmt)
        assert planes.dtype == jnp.uint32
        assert planes.shape == (fmt.bits, 3, num_words(k))
        np.testing.assert_array_equal(planes, numpy_planes(codes, fmt))


@every_format
def test_unpacking_returns_the_codes(fmt):
    for k in SIZES:
        codes = random_codes(fmt, 2, 3, k)
        unpacked = unpack_codes(jnp.asarray(numpy_planes(codes, fmt)), fmt, k)
        assert unpacked.dtype == jnp.uint8
        np.testing.assert_array_equal(unpacked, codes)


@settings(max_examples=10)
@given(fmt=st.sampled_from(FORMATS), n=st.integers(1, 4), k=st.integers(1, 130))
def test_packing_round_trips_at_any_size(fmt, n, k):
    codes = random_codes(fmt, n, k)
    np.testing.assert_array_equal(unpack_codes(pack_codes(jnp.asarray(codes), fmt), fmt, k), codes)


@pytest.mark.parametrize("k", SIZES)
def test_contracted_size_excludes_padding_and_padding_is_zero(k):
    """All codes are the largest, so every plane has exactly n k ones if its padding is zero."""
    w = from_codes(np.full((k, 3), 7), 3, 0, jnp.ones((3, 1)))
    assert w.contracted_size == k
    assert w.shape == (k, 3)
    ones = jax.lax.population_count(w.planes).sum(axis=(1, 2))
    np.testing.assert_array_equal(ones, [3 * k] * 3)


@every_format
@pytest.mark.parametrize("group_size", [None, 1, 5, 32, 40])
@pytest.mark.sample(2)
def test_row_sums_are_sums_of_codes_by_group(fmt, group_size):
    w = quantize(normal(2, 3, 40), fmt, -1, group_size, scales="float")
    starts = range(0, 40, group_size or 40)
    codes = np.asarray(w.codes(), int)
    expected = np.stack([codes[..., s : s + (group_size or 40)].sum(-1) for s in starts], -1)
    np.testing.assert_array_equal(w.row_sums, expected)
    assert w.num_groups == len(starts) == w.scale.shape[-1]


@pytest.mark.parametrize("calibration", ["absmax", "minmax"])
@pytest.mark.parametrize("group_size", [None, 16])
def test_nbytes_is_the_size_of_the_leaves(group_size, calibration):
    w = quantize(normal(100, 6), 3, 0, group_size, calibration, scales="float")
    groups = 7 if group_size else 1
    per_group = 12 if calibration == "minmax" else 8  # scale, row_sums and offset of 4 bytes each
    assert w.nbytes == 3 * 6 * 4 * 4 + 6 * groups * per_group
    assert w.nbytes == sum(len(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(w))


@every_format
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.sample(2)
def test_decoding_follows_the_definition(fmt, axis):
    w = quantize(normal(2, 10, 12), fmt, axis, 4, "minmax", scales="float")
    codes = np.asarray(w.codes(), np.float64)
    k = codes.shape[-1]
    values = 2 * codes - fmt.max_value
    per_element = lambda per_group: np.repeat(np.asarray(per_group, np.float64), 4, -1)[..., :k]  # noqa: E731
    numbers = per_element(w.scale) * values + per_element(w.offset)
    if axis == -2:
        values, numbers = values.swapaxes(-1, -2), numbers.swapaxes(-1, -2)
    assert w.values().dtype == jnp.int32
    assert w.dequantize().dtype == jnp.float32
    np.testing.assert_array_equal(w.values(), values)
    np.testing.assert_allclose(w.dequantize(), numbers, rtol=1e-6, atol=1e-6)


def test_transpose_swaps_the_last_two_axes_and_shares_the_data():
    w = quantize(normal(2, 10, 12), 4, -2)
    assert w.T.shape == (2, 12, 10)
    assert w.T.axis == -1
    assert w.T.planes is w.planes
    np.testing.assert_array_equal(w.T.dequantize(), w.dequantize().swapaxes(-1, -2))
    assert w.T.T.axis == w.axis


def test_repr_shows_shape_bits_groups_and_offset():
    text = repr(quantize(normal(10, 12), TERNARY, 0, 5, "minmax", scales="float"))
    assert text == "BipolarArray(shape=(10, 12), bits=1.58, group_size=5, with offset)"


@pytest.mark.parametrize("bits", range(1, 9))
def test_signed_integers_pack_without_loss(bits):
    """v = 2 c + 1: with scale d / 2 and offset -d / 2, scale * v + offset = d c exactly."""
    half = 2 ** (bits - 1)
    signed = np.random.default_rng(bits).integers(-half, half, (3, 40))
    d = np.array([[0.5], [1.0], [3.0]], np.float32)
    w = from_codes(signed + half, bits, -1, d / 2, -d / 2)
    np.testing.assert_array_equal(w.dequantize(), signed * d)


def test_q4_1_blocks_pack_without_loss():
    """GGUF's Q4_1: w = d q + m in blocks of 32, d and m float16. The sums are exact in float32."""
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (5, 96))
    d, m = (rng.integers(-64, 64, (5, 3)).astype(np.float16) / 64 for _ in range(2))
    d, m = d.astype(np.float32), m.astype(np.float32)
    w = from_codes(q, 4, -1, d / 2, m + d * 15 / 2, group_size=32)
    np.testing.assert_array_equal(w.dequantize(), q * np.repeat(d, 32, 1) + np.repeat(m, 32, 1))
    np.testing.assert_array_equal(w.codes(), q)


@pytest.mark.parametrize("axis", [-1, -2, 0, 1])
def test_from_codes_takes_either_layout(axis):
    codes = random_codes(BipolarFormat(4), 6, 40)
    rows = 6 if axis in (-1, 1) else 40
    w = from_codes(codes, 4, axis, jnp.ones((rows, 1)))
    np.testing.assert_array_equal(w.values(), 2 * codes.astype(int) - 15)


@pytest.mark.parametrize("fewer", range(1, 9))
@pytest.mark.parametrize("calibration", ["absmax", "minmax"])
def test_truncation_is_rounding_to_nearest_on_the_coarser_grid(fewer, calibration):
    """Rounds the numbers in float64 to the grid of scale * 2^(8 - m); skips numbers near the middle of two values."""
    x = normal(4, 200, seed=fewer)
    whole = quantize(x, 8, -1, 70, calibration)
    short = whole.truncate(fewer)
    assert short.bits == fewer
    np.testing.assert_array_equal(short.scale, np.asarray(whole.scale) * 2.0 ** (8 - fewer))
    per_element = lambda per_group: np.repeat(np.asarray(per_group, np.float64), 70, -1)[:, :200]  # noqa: E731
    center = 0 if whole.offset is None else per_element(whole.offset)
    steps = (x - center) / (2 * per_element(short.scale))  # an odd value v is 2 (floor(steps) + 1/2)
    largest = 2**fewer - 1
    nearest = np.clip(2 * np.floor(steps) + 1, -largest, largest)
    clear = np.abs(steps - np.round(steps)) > 1e-5 * 2.0 ** (fewer - 8) * 256
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(short.values())[clear], nearest[clear])
    short.check()


@every_format
def test_truncating_to_all_bits_changes_nothing(fmt):
    if fmt.ternary:
        with pytest.raises(ValueError, match="ternary"):
            quantize(normal(3, 8), fmt, -1).truncate(2)
    else:
        w = quantize(normal(3, 8), fmt, -1)
        assert w.truncate(fmt.bits) is w


@settings(max_examples=6)
@example(bits=8, fewer=1)
@given(bits=st.integers(1, 8), fewer=st.integers(1, 8))
def test_truncation_drops_low_planes_and_recomputes_row_sums(bits, fewer):
    fewer = min(bits, fewer)
    w = quantize(normal(2, 3, 40), bits, -1, 16, "minmax", scales="float")
    short = w.truncate(fewer)
    codes = np.asarray(w.codes(), int) >> (bits - fewer)
    np.testing.assert_array_equal(short.codes(), codes)
    np.testing.assert_array_equal(short.planes, w.planes[:, bits - fewer :])
    np.testing.assert_array_equal(short.row_sums, np.add.reduceat(codes, [0, 16, 32], axis=-1))
    np.testing.assert_array_equal(short.offset, w.offset)


def test_truncation_errors():
    w = quantize(normal(3, 8), 4, -1)
    for bits, message in [(5, "at most 4, or quantize again"), (0, "got 0"), (2.5, r"got 2\.5"), (-1, "got -1")]:
        with pytest.raises(ValueError, match=message):
            w.truncate(bits)


@pytest.mark.wrong_arrays
def test_check_names_the_leaf_whose_shape_is_wrong():
    w = quantize(normal(40, 6), 4, 0, 16, scales="float")
    w.check()
    for field, leaf in {"scale": w.scale[:, :2], "row_sums": w.row_sums[:5], "offset": jnp.ones(6)}.items():
        with pytest.raises(ValueError, match=rf"got {field} .*cut along k"):
            dataclasses.replace(w, **{field: leaf}).check()
    for planes in (w.planes[:3], w.planes[..., :1]):
        with pytest.raises(ValueError, match=r"should be \(4, 6, 2\)"):
            dataclasses.replace(w, planes=planes).check()


BAD = {"bits": [0, 9, True, 2.5, -1], "group_size": [0, -1, 41, True, 2.5], "calibration": ["best", "max"]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_errors_of_quantize_name_the_argument_its_value_and_the_remedy(name, value):
    remedy = {
        "bits": "from 1 to 8",
        "group_size": "from 1 to the contracted size 40.*None",
        "calibration": "absmax, mse",
    }
    with pytest.raises(
        ValueError, match=rf"{name} must be .*{remedy[name]}.*got {value!r}|{name} must be .*got {value!r}.*None"
    ):
        quantize(**{"x": jnp.ones((40, 6)), "bits": 4, "axis": 0} | {name: value})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((4, 4), jnp.int32), r"got int32: cast it first.*astype"),
        (jnp.ones((4, 4), bool), "got bool"),
        (jnp.ones((4, 4), jnp.complex64), "got complex64"),
        (jnp.ones((4, 4)).at[1, 2].set(jnp.nan).at[0, 0].set(-jnp.inf), "2 NaN or Inf among its 16.*nan_to_num"),
        (np.full((4, 4), 1e300), "16 NaN or Inf"),
        (jnp.ones((0, 4)), r"shape \(0, 4\).*at least one"),
        (jnp.ones((4, 0)), r"shape \(4, 0\).*at least one"),
        (jnp.ones((0, 4, 4)), r"shape \(0, 4, 4\).*at least one"),
        (jnp.ones(4), r"two axes.*shape \(4,\)"),
        (jnp.float32(1), r"two axes.*shape \(\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_quantize_refuses_other_dtypes_nan_inf_and_empty_axes(x, message):
    with pytest.raises(ValueError, match=message):
        quantize(x, 4, -1)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (0, "axis=0.*batch axis.*move it"),
        (-3, "batch axis"),
        (3, "not an axis"),
        (-4, "not an axis"),
        (True, "axis=True"),
    ],
)
def test_quantize_contracts_one_of_the_last_two_axes(axis, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((2, 3, 4)), 4, axis)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": jnp.ones((3, 8))}, "integers, got float32: .*quantize"),
        ({"codes": np.full((3, 8), 16)}, r"span 16\.\.16, outside 0\.\.15 of 4 bits.*more bits"),
        ({"codes": np.full((3, 8), -1)}, r"span -1\.\.-1"),
        ({"codes": np.full((3, 8), 3), "bits": TERNARY}, r"outside 0\.\.2"),
        ({"codes": np.ones((3, 0), int)}, r"shape \(3, 0\)"),
        ({"codes": np.ones(8, int)}, "two axes"),
        ({"bits": 9}, "got 9"),
        ({"axis": 2}, "not an axis"),
        ({"group_size": 9}, "contracted size 8, got 9"),
        ({"scale": jnp.ones(3)}, r"scale has shape \(3,\): .*need \(3, 1\)"),
        ({"offset": jnp.ones((3, 2))}, r"offset has shape \(3, 2\): .*need \(3, 1\)"),
        ({"group_size": 4}, r"scale has shape \(3, 1\): .*need \(3, 2\)"),
    ],
)
def test_from_codes_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_codes(**{"codes": np.ones((3, 8), int), "bits": 4, "axis": -1, "scale": jnp.ones((3, 1))} | arguments)
