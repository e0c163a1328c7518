"""`fake_quant` equals quantize().dequantize() and has a straight-through gradient; `Precision` parses and prints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bipolar_jax import TERNARY, BipolarFormat, Precision, fake_quant, quantize
from tests.support.integer_products import normal

FORMATS = [*(BipolarFormat(bits) for bits in (1, 2, 4, 8)), TERNARY]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
every_calibration = pytest.mark.parametrize("calibration", ["absmax", "mse", "minmax"])
EPS = float(np.finfo(np.float32).eps)


@every_format
@every_calibration
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.sample(2)
def test_equals_quantize_then_dequantize(fmt, calibration, axis):
    x = normal(2, 10, 12)
    expected = quantize(x, fmt, axis, 5, calibration, scales="float").dequantize()
    rounded = fake_quant(x, fmt, axis, 5, calibration, scales="float")
    # Only one of them is jitted, where a fused multiply-add rounds once instead of twice.
    np.testing.assert_allclose(rounded, expected, rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_keeps_shape_and_dtype(dtype):
    x = jnp.asarray(normal(3, 8), dtype)
    rounded = fake_quant(x, 2, 0)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, quantize(x, 2, 0).dequantize().astype(dtype))


def surrogate(x, decoded, inside):
    """The function whose gradient is the straight-through one: slope 1 within the range, constant outside."""
    return lambda moved: decoded + np.where(inside, moved - x, 0)


@every_format
@every_calibration
@pytest.mark.sample(2)
def test_gradient_is_that_of_the_straight_through_definition(fmt, calibration):
    """Compares with central differences of the surrogate in float64, which are exact because it is linear."""
    x = normal(3, 12).astype(np.float64)
    w = quantize(jnp.asarray(x, jnp.float32), fmt, -1, 5, calibration, scales="float")
    per_element = lambda per_group: np.repeat(np.asarray(per_group, np.float64), 5, axis=-1)[:, :12]  # noqa: E731
    center = 0 if w.offset is None else per_element(w.offset)
    inside = np.abs(x - center) <= per_element(w.scale) * (fmt.max_value + 1)
    function = surrogate(x, np.asarray(w.dequantize(), np.float64), inside)
    cotangent = normal(3, 12).astype(np.float64)
    step, expected = 1e-3, np.zeros_like(x)
    for index in np.ndindex(x.shape):
        move = np.zeros_like(x)
        move[index] = step
        expected[index] = np.sum(cotangent * (function(x + move) - function(x - move))) / (2 * step)
    loss = lambda x: jnp.sum(fake_quant(x, fmt, -1, 5, calibration, scales="float") * cotangent)  # noqa: E731
    got = jax.grad(loss)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
    if calibration != "mse":
        assert inside.all()


def test_clipped_numbers_have_no_gradient():
    """At two bits the mse scale fits the 256 small numbers and clips the outlier."""
    x = np.concatenate([np.tile([1.0, -1.0, 3.0, -3.0], 64), [9.0]]).astype(np.float32)[None]
    gradient = jax.grad(lambda x: fake_quant(x, 2, -1, calibration="mse").sum())(x)
    np.testing.assert_array_equal(gradient[0], [1.0] * 256 + [0.0])


@pytest.mark.parametrize("axis", [-1, -2])
def test_gradient_has_the_dtype_and_layout_of_x(axis):
    x = jnp.asarray(normal(4, 6), jnp.bfloat16)
    cotangent = jnp.arange(24, dtype=jnp.bfloat16).reshape(4, 6)
    gradient = jax.grad(lambda x: (fake_quant(x, 4, axis) * cotangent).sum())(x)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, cotangent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "from 1 to 8, got 0"),
        ({"axis": 0}, "batch axis"),
        ({"group_size": 9}, "contracted size 8, got 9"),
        ({"calibration": "best"}, "absmax, mse, minmax, absmean, got 'best'"),
        ({"x": jnp.ones((2, 3, 8), jnp.int32)}, r"float32, bfloat16, float16, got int32.*astype"),
        ({"x": jnp.full((2, 3, 8), jnp.nan)}, "48 NaN or Inf among its 48"),
        ({"x": jnp.ones(8)}, r"two axes.*shape \(8,\)"),
    ],
)
def test_errors_are_those_of_quantize(arguments, message):
    arguments = {"x": jnp.ones((2, 3, 8)), "bits": 4, "axis": -1} | arguments
    for function in (fake_quant, quantize):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_an_empty_batch_has_nothing_to_round():
    """Activations may be empty; weights may not, see `quantize`."""
    assert fake_quant(jnp.ones((2, 0, 8)), 4, -1).shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("W4A8", Precision(4, 8)),
        ("W4A8g64", Precision(4, 8, 64)),
        ("W4A16", Precision(4)),
        ("W1.58A8", Precision(TERNARY, 8)),
        ("W1.58A16g128", Precision(TERNARY, None, 128)),
        ("W1A1", Precision(1, 1)),
        ("W4A8s", Precision(4, 8, a_symmetric=True)),
        ("W4A2sg64f", Precision(4, 2, 64, scales="float", a_symmetric=True)),
    ],
)
def test_parse_reads_the_notation_that_str_prints(text, precision):
    assert Precision.parse(text) == precision
    assert str(precision) == text


@given(
    st.builds(
        Precision,
        w_bits=st.integers(1, 8) | st.just(TERNARY),
        a_bits=st.none() | st.integers(1, 8),
        group_size=st.none() | st.integers(1, 10**6),
        calibration=st.sampled_from(["absmax", "mse", "minmax"]),
        scales=st.none() | st.just("float"),
    )
)
def test_precision_round_trips_through_its_text(precision):
    assert Precision.parse(str(precision), precision.calibration) == precision


def test_precisions_of_equal_bits_are_equal():
    assert Precision(BipolarFormat(4), 8) == Precision(4, 8)
    assert hash(Precision(BipolarFormat(4), 8)) == hash(Precision(4, 8))
    assert Precision(2) != Precision(TERNARY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a_symmetric": True}, "float activations have no grid: leave it False"),
        ({"a_bits": 1, "a_symmetric": True}, "numbers of 1 bits are symmetric by themselves"),
        ({"a_bits": 8, "a_symmetric": 1}, "symmetric must be True or False, got 1"),
        ({"w_bits": BipolarFormat(4, symmetric=True)}, "weights have no symmetric format"),
    ],
)
def test_symmetric_grids_are_those_of_activations_of_two_bits_and_more(fields, message):
    with pytest.raises(ValueError, match=message):
        Precision(**{"w_bits": 4} | fields)


@pytest.mark.parametrize(
    "text", ["", "4", "W4", "A8", "w4a8", "W4A8g", "W4A8g-1", "W4.5A8", "W4A8 g64", "W4A1.58", "W4sA8"]
)
def test_errors_of_parse_name_the_text_and_the_expected_form(text):
    with pytest.raises(ValueError, match=rf"precision {text!r} is not of the form W4A8"):
        Precision.parse(text)


def test_parse_takes_texts_alone():
    with pytest.raises(ValueError, match='parsed of its text, such as "W4A8g64", got 48'):
        Precision.parse(48)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W0A8", "from 1 to 8, got 0"),
        ("W9A8", "from 1 to 8, got 9"),
        ("W16A16", "from 1 to 8, got 16"),
        ("W4A9", "from 1 to 8, got 9"),
        ("W4A0", "from 1 to 8, got 0"),
        ("W4A8g0", "group_size must be an integer of at least 1, or None, got 0"),
    ],
)
def test_parse_refuses_numbers_out_of_range(text, message):
    with pytest.raises(ValueError, match=message):
        Precision.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w_bits": 2.5}, "got 2.5"),
        ({"w_bits": True}, "got True"),
        ({"a_bits": 2.5}, "got 2.5"),
        ({"group_size": 2.5}, "got 2.5"),
        ({"group_size": True}, "got True"),
        ({"calibration": "best"}, "got 'best'"),
    ],
)
def test_precision_checks_its_fields(arguments, message):
    with pytest.raises(ValueError, match=message):
        Precision(**{"w_bits": 4} | arguments)
