"""What `bj.matmul` makes of the Hopper kernels: whole products, what they do not serve, what is said of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.arithmetic.operands import expand_planes
from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.packing.words import pack_codes
from tests.support.integer_products import W_FORMATS, random_codes
from tests.support.interpreter import races_found

# A kernel that deadlocks waits for ever.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


@pytest.mark.parametrize("fmt", W_FORMATS, ids=lambda fmt: f"W{fmt.name}")
def test_bytes_of_weights_are_values_or_signed_codes(fmt):
    codes = random_codes(fmt, 4, 64, 0)
    codes[0, : fmt.max_value + 1] = np.arange(min(64, fmt.max_value + 1))
    expected = np.asarray(fmt.values(jnp.asarray(codes)) if fmt.max_value < 128 else fmt.signed_codes(codes))
    words = np.asarray(expand_planes(pack_codes(jnp.asarray(codes), fmt), fmt))
    # Byte t of word 8 B + j is element 32 B + 8 t + j.
    in_order = words.view(np.int8).reshape(4, 2, 8, 4).swapaxes(2, 3).reshape(4, 64)
    np.testing.assert_array_equal(in_order, expected)


@pytest.mark.parametrize(
    ("w_bits", "a_bits", "group_size", "offset", "dtype"),
    [
        (1, 1, None, True, jnp.float32),
        (2, 3, None, False, jnp.bfloat16),
        (4, 8, None, True, jnp.float16),
        (8, 8, None, False, jnp.bfloat16),
        (4, 8, 128, False, jnp.float32),
        (4, 8, 64, True, jnp.float32),
        (8, 1, 128, False, jnp.float32),
        (8, 8, 32, True, jnp.float32),
    ],
)
@pytest.mark.sample(1)
def test_the_whole_product_is_that_of_xla(w_bits, a_bits, group_size, offset, dtype):
    rng = np.random.default_rng(w_bits)
    calibration = "minmax" if offset else "absmax"
    w = bj.quantize(rng.normal(size=(200, 30)).astype(np.float32), w_bits, 0, group_size, calibration, scales="float")
    x = jnp.asarray(rng.normal(size=(9, 200)), dtype).at[3].set(0)
    bias = jnp.asarray(rng.normal(size=30), dtype)
    with interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        y = bj.matmul(x, w, a_bits, bias=bias, implementation="sm90")
    expected = np.asarray(bj.matmul(x.astype(jnp.float32), w, a_bits, bias=bias, implementation="xla"))
    assert y.dtype == dtype
    # XLA rounds an element of x that lies between two codes one way or the other; one step of one element.
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(y[3], bias)
    assert not races_found()


def test_what_is_not_served_goes_to_xla():
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(96, 8)).astype(np.float32), jnp.ones((2, 96))
    grouped = bj.quantize(kernel, 4, 0, 48, scales="float")
    unserved = {
        "groups must have 32, 64 or a multiple of 128 elements up to 1024, not 48": (grouped, 8),
        "float activations must be bfloat16 or float16": (bj.quantize(kernel, 4, 0), None),
    }
    long = bj.from_codes(np.zeros((1, 131072), int), 1, -1, np.ones((1, 1), np.float32)).T
    with interpreted(plgpu.InterpretGPUParams()):
        for reason, (w, a_bits) in unserved.items():
            explanation = bj.explain(x, w, a_bits)
            assert explanation.implementation == "xla"
            assert reason in explanation.passed_over["sm90"]
            with pytest.raises(NotImplementedError, match=reason):
                bj.matmul(x, w, a_bits, implementation="sm90")
            np.testing.assert_array_equal(bj.matmul(x, w, a_bits), bj.matmul(x, w, a_bits, implementation="xla"))
        assert "a row takes 524288 bytes" in bj.explain(jnp.ones((1, 131072)), long, 1).passed_over["sm90"]


def test_kernels_are_explained():
    kernel, many, few = np.ones((96, 8), np.float32), jnp.ones((70, 96)), jnp.ones((2, 96))
    with interpreted(plgpu.InterpretGPUParams()):
        assert bj.explain(many, bj.quantize(kernel, 2, 0), 2).kernel == "binary tensor cores, 2 x 2 planes"
        assert "expanded from 4 planes" in bj.explain(many, bj.quantize(kernel, 4, 0), 8).kernel
        explanation = bj.explain(few, bj.quantize(kernel, 4, 0), 8)
        assert explanation.kernel == "binary tensor cores, 8 x 4 planes, weights as rows"
        assert explanation.reason == "2 tokens: bound by reading the weights"
