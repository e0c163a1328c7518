"""Results that float32 can hold are finite, whatever the order in which the scales are applied."""

import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj

BACKENDS = ("reference", "xla")


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("calibration", ["absmax", "minmax"])
@pytest.mark.parametrize(("x", "w"), [(1e-30, 4e37), (1e30, 1e-35), (1e-35, 4e37), (3e38, 1e-3), (3e37, -1e-30)])
@pytest.mark.sample(2)
def test_scales_of_any_size_cancel(x, w, group_size, calibration, implementation):
    packed = bj.quantize(np.full((37, 2), w, np.float32), 8, 0, group_size, calibration)
    for a_bits in (8, 4, 2, 1):
        found = bj.matmul(np.full((3, 37), x, np.float32), packed, a_bits, implementation=implementation)
        np.testing.assert_allclose(found, np.full((3, 2), 37 * np.float64(x) * w), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float_activations_near_the_largest_do_not_overflow(dtype):
    packed = bj.quantize(np.full((37, 2), 1e-3, np.float32), 8, 0)
    x = jnp.full((3, 37), 3e38, dtype)
    expected = 37 * np.float64(x[0, 0]) * np.float64(packed.dequantize()[0, 0])
    np.testing.assert_allclose(np.float64(bj.matmul(x, packed, None)), np.full((3, 2), expected), rtol=2**-8)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_negative_scales_multiply(implementation):
    codes, scale = np.arange(64).reshape(32, 2) % 16, np.float32([[-2.0], [3e-30]])
    packed = bj.from_codes(codes, 4, 0, scale)
    x = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    found = bj.matmul(x, packed, 8, implementation=implementation)
    np.testing.assert_allclose(found, x @ np.asarray(packed.dequantize()), rtol=0.05)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("a_bits", [8, 1, None])
def test_what_is_infinite_or_undefined_stays_so(a_bits, implementation):
    packed = bj.quantize(np.ones((32, 2), np.float32), 8, 0)
    x = np.ones((3, 32), np.float32)
    x[0, 3], x[1, 5] = np.nan, np.inf
    found = np.asarray(bj.matmul(x, packed, a_bits, implementation=implementation))
    assert not np.isfinite(found[:2]).any()
    np.testing.assert_allclose(found[2], 32, rtol=1e-5)
