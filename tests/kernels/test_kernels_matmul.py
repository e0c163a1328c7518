"""quantize_tokens, quantized_matmul and weight_only_matmul against their definitions in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarArray, BipolarFormat, quantize
from bipolar_jax.kernels.semantics.activations import QuantizedTokens, quantize_tokens
from tests.support.backends import PORTABLE

EPS = float(np.finfo(np.float32).eps)
M, N = 5, 4
every_backend = pytest.mark.parametrize("backend", PORTABLE.values(), ids=PORTABLE)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
every_a_bits = pytest.mark.parametrize("a_bits", range(1, 9))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def activations(k: int) -> np.ndarray:
    """Rows of every kind: two ordinary ones, a one-sided one, one with an outlier, zeros."""
    x = normal(M, k)
    x[2] = np.abs(x[2]) + 1
    x[3, k // 2] = 50
    x[4] = 0
    return x


def tokens_of(x: np.ndarray, a_bits: int) -> QuantizedTokens:
    return jax.jit(quantize_tokens, static_argnums=1)(x, BipolarFormat(a_bits))


def decode_tokens(tokens: QuantizedTokens, a_bits: int) -> np.ndarray:
    """scale * (v - v0) in float64."""
    values = 2.0 * np.asarray(tokens.codes) - (2**a_bits - 1)
    return np.asarray(tokens.scale, np.float64)[:, None] * (values - np.asarray(tokens.zero_value)[:, None])


@every_a_bits
def test_tokens_are_within_half_a_step(a_bits):
    """A step is 2 scale; the zero is rounded to the grid, which may cost the extremes half a step, no more."""
    x = activations(64)
    tokens = tokens_of(x, a_bits)
    if a_bits == 1:
        np.testing.assert_allclose(tokens.scale, np.abs(x).max(-1), rtol=EPS)
        np.testing.assert_array_equal(np.asarray(tokens.codes)[:4] == 1, x[:4] >= 0)
    else:
        error = np.abs(decode_tokens(tokens, a_bits) - x)
        assert np.all(error <= np.asarray(tokens.scale)[:, None] + 4 * EPS * np.abs(x).max(-1, keepdims=True))


@pytest.mark.parametrize("a_bits", range(2, 9))
def test_the_grid_of_a_token_spans_its_extremes_and_zero(a_bits):
    x = activations(64)
    tokens = tokens_of(x, a_bits)
    span = np.maximum(x.max(-1), 0).astype(np.float64) - np.minimum(x.min(-1), 0)
    np.testing.assert_allclose(tokens.scale, span / (2 * (2**a_bits - 1)), rtol=4 * EPS)
    assert np.all(np.abs(tokens.zero_value) <= 2**a_bits - 1)
    assert np.all(np.asarray(tokens.zero_value) % 2 == 1)  # on the odd grid
    assert np.asarray(tokens.zero_value)[2] == -(2**a_bits - 1)  # a positive row: zero is the lowest code


@every_a_bits
def test_a_span_leaves_out_the_ends_of_a_range(a_bits):
    """The grid is that of a token whose numbers are 0.8 times as large; numbers beyond it take its ends."""
    x, clipped = activations(64), BipolarFormat(a_bits, span=0.8)
    tokens = jax.jit(quantize_tokens, static_argnums=1)(x, clipped)
    smaller = tokens_of(np.float32(0.8) * x, a_bits)
    np.testing.assert_allclose(tokens.scale, smaller.scale, rtol=4 * EPS)
    np.testing.assert_array_equal(tokens.zero_value, smaller.zero_value)
    grid = np.asarray(tokens.scale, np.float64)[:, None, None] * (
        clipped.grid() - np.asarray(tokens.zero_value)[:, None, None]
    )
    nearest = np.abs(x[:4, :, None] - grid[:4]).min(-1)
    found = np.abs(decode_tokens(tokens, a_bits)[:4] - x[:4])
    np.testing.assert_allclose(found, nearest, atol=4 * EPS * 50)
    np.testing.assert_array_equal(
        jax.jit(quantize_tokens, static_argnums=1)(x, BipolarFormat(a_bits, span=1)).codes, tokens_of(x, a_bits).codes
    )


@pytest.mark.parametrize("a_bits", range(2, 9))
@pytest.mark.parametrize("span", [1, 0.8])
@pytest.mark.sample(2)
def test_symmetric_tokens_are_those_of_compressed_tensors(a_bits, span):
    """q = round(x / d), d = max|x| / (2^bits - 1) * 2, clipped to signed integers; 0 is q = 0 in every token."""
    x, symmetric = activations(64), BipolarFormat(a_bits, span=span, symmetric=True)
    tokens = jax.jit(quantize_tokens, static_argnums=1)(x, symmetric)
    step = 2 * span * np.abs(x).max(-1, keepdims=True).astype(np.float64) / (2**a_bits - 1)
    np.testing.assert_allclose(2 * tokens.scale[:, None], step, rtol=4 * EPS)
    np.testing.assert_array_equal(tokens.zero_value, 1)
    half = 2 ** (a_bits - 1)
    q = np.clip(np.floor(x[:4] / step[:4] + 0.5), -half, half - 1)
    found = np.asarray(tokens.codes)[:4].astype(np.int32) - half
    ties = np.abs(x[:4] / step[:4] % 1 - 0.5) < 1e-4
    assert np.all((found == q) | ties)
    steps = np.asarray(tokens.codes, np.float32) - half
    np.testing.assert_array_equal(tokens.dequantize(symmetric), np.asarray(2 * tokens.scale)[:, None] * steps)
    x[:, ::3] = 0
    assert np.all(decode_tokens(jax.jit(quantize_tokens, static_argnums=1)(x, symmetric), a_bits)[:, ::3] == 0)


@pytest.mark.parametrize("a_bits", range(2, 9))
def test_zero_is_represented_exactly(a_bits):
    x = activations(64)
    x[:, ::3] = 0
    assert np.all(decode_tokens(tokens_of(x, a_bits), a_bits)[:, ::3] == 0)


@every_a_bits
def test_a_row_of_zeros_has_scale_zero(a_bits):
    tokens = tokens_of(activations(64), a_bits)
    assert tokens.scale[4] == 0
    assert np.all(np.asarray(tokens.dequantize(BipolarFormat(a_bits)))[4] == 0)


def test_small_numbers_beside_a_one_sided_outlier_become_zero_not_the_scale():
    tokens = tokens_of(np.array([[1000, 0.1, -0.1, 0.05]], np.float32), 8)
    decoded = decode_tokens(tokens, 8)[0]
    assert decoded[1:].tolist() == [0, 0, 0]
    assert abs(decoded[0] - 1000) <= tokens.scale[0]


def test_one_bit_is_symmetric():
    tokens = tokens_of(np.array([[4, 0.1, -0.1, -1]], np.float32), 1)
    assert tokens.zero_value.tolist() == [0]
    np.testing.assert_array_equal(decode_tokens(tokens, 1), [[4, 4, -4, -4]])


@every_a_bits
def test_tokens_decode_as_defined(a_bits):
    tokens = tokens_of(activations(64), a_bits)
    np.testing.assert_allclose(tokens.dequantize(BipolarFormat(a_bits)), decode_tokens(tokens, a_bits), rtol=EPS)


@every_a_bits
def test_tokens_of_huge_rows_are_those_of_the_row_scaled_down(a_bits):
    x = np.array([[4e37, -4e37, 1.1e37, -1.2e37]], np.float32)
    huge, small = tokens_of(x, a_bits), tokens_of(x * np.float32(2.0**-100), a_bits)
    np.testing.assert_array_equal(huge.codes, small.codes)
    np.testing.assert_array_equal(huge.zero_value, small.zero_value)


def weight_parts(w: BipolarArray) -> tuple[np.ndarray, np.ndarray]:
    """The dequantized w, and the sum of magnitudes it is made of, [k, n] in float64."""
    k = w.contracted_size
    spread = lambda figure: np.repeat(np.asarray(figure, np.float64), w.group_size or k, -1)[:, :k].T  # noqa: E731
    scaled = spread(w.scale) * np.asarray(w.values(), np.float64)
    offset = 0 if w.offset is None else spread(w.offset)
    return scaled + offset, np.abs(scaled) + np.abs(offset)


CASES = [  # k, w_format, group_size, calibration
    (33, TERNARY, None, "absmax"),
    (100, BipolarFormat(4), 7, "minmax"),
    (100, BipolarFormat(1), None, "minmax"),
    (576, BipolarFormat(3), 64, "mse"),
    (576, BipolarFormat(8), None, "absmax"),
]


@every_backend
@pytest.mark.parametrize(("k", "w_format", "group_size", "calibration"), CASES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.sample(2)
def test_quantized_matmul_is_the_product_of_what_the_codes_stand_for(
    backend, k, w_format, group_size, calibration, biased
):
    """Integers are exact. Each group then rounds a few float32 terms, and the sum of G groups G more."""
    x = activations(k)
    w = quantize(normal(k, N, seed=1) + 0.5, w_format, 0, group_size, calibration, scales="float")
    bias = normal(N, seed=2) if biased else None
    a_bits = (1, 2, 4, 8)

    @jax.jit
    def run(x, w, bias):
        return [backend.quantized_matmul(x, w, BipolarFormat(bits), bias) for bits in a_bits]

    w_hat, w_size = weight_parts(w)
    for bits, got in zip(a_bits, run(x, w, bias), strict=True):
        tokens = tokens_of(x, bits)
        values = 2.0 * np.asarray(tokens.codes) - (2**bits - 1)
        zero = np.asarray(tokens.zero_value, np.float64)[:, None]
        scale = np.asarray(tokens.scale, np.float64)[:, None]
        expected = scale * (values - zero) @ w_hat + (0 if bias is None else bias)
        size = scale * (np.abs(values) + np.abs(zero)) @ w_size + (0 if bias is None else np.abs(bias))
        assert got.dtype == jnp.float32
        assert np.all(np.abs(got - expected) <= (w.num_groups + 8) * EPS * size), f"W{w_format.name}A{bits}"


@every_backend
@every_dtype
@pytest.mark.parametrize(("k", "w_format", "group_size", "calibration"), CASES)
def test_weight_only_matmul_is_the_product_with_dequantized_weights(
    backend, dtype, k, w_format, group_size, calibration
):
    """Sums of K terms in float32; weights and result may be rounded to x's dtype."""
    x = jnp.asarray(activations(k), dtype)
    w = quantize(normal(k, N, seed=1) + 0.5, w_format, 0, group_size, calibration, scales="float")
    bias = jnp.asarray(normal(N, seed=2), dtype)
    got = jax.jit(backend.weight_only_matmul)(x, w, bias)
    w_hat, w_size = weight_parts(w)
    wide, wide_bias = np.asarray(x, np.float64), np.asarray(bias, np.float64)
    size = np.abs(wide) @ w_size + np.abs(wide_bias)
    assert got.dtype == dtype
    error = np.abs(np.asarray(got, np.float64) - (wide @ w_hat + wide_bias))
    assert np.all(error <= (k * EPS + 2 * float(jnp.finfo(dtype).eps)) * size)


@every_backend
@every_dtype
@pytest.mark.sample(2)
def test_narrow_floats_give_the_float32_result_rounded_once(backend, dtype):
    x = jnp.asarray(activations(100), dtype)
    w = quantize(normal(100, N, seed=1), 4, 0, 32, scales="float")
    run = jax.jit(lambda x: backend.quantized_matmul(x, w, BipolarFormat(8), None))
    got, wide = run(x), run(x.astype(jnp.float32))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wide.astype(dtype))
