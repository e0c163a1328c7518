"""Products with integer groups: one exact int32 sum over all of K, on every backend."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax import TERNARY, BipolarArray, BipolarFormat, matmul
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from tests.support.backends import PORTABLE
from tests.support.integer_products import codes_with_extremes, normal, packed_in_integer_groups

FORMATS = [*(BipolarFormat(bits) for bits in (1, 4, 6)), TERNARY]
A_FORMATS = [BipolarFormat(1), BipolarFormat(5), BipolarFormat(8)]
every_backend = pytest.mark.parametrize("backend", PORTABLE.values(), ids=PORTABLE)
EPS = float(np.finfo(np.float32).eps)


def weights(n: int, k: int, group_size: int, seed: int = 0) -> BipolarArray:
    """[k, n] of 4 bits."""
    fmt = BipolarFormat(4)
    return packed_in_integer_groups(codes_with_extremes(fmt, n, k, seed), fmt, group_size, seed)


def values_of(w) -> np.ndarray:
    """[k, n] in int64, by the definition."""
    k, size = w.contracted_size, w.group_size
    scale, offset = (np.repeat(np.asarray(a, int), size, axis=1)[:, :k] for a in (w.groups.scale, w.groups.offset))
    return (scale * np.asarray(w.codes(), int) + offset).T


@every_backend
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("k", "group_size"), [(100, 48), (70, 33)])
@pytest.mark.sample(2)
def test_integer_product_is_exact(backend, fmt, k, group_size):
    w = packed_in_integer_groups(codes_with_extremes(fmt, 4, k, seed=9), fmt, group_size, seed=k)
    xs = [codes_with_extremes(a_format, 3, k, seed=a_format.bits) for a_format in A_FORMATS]
    for x, a_format in zip(xs, A_FORMATS, strict=True):
        product = backend.integer_matmul(jnp.asarray(x), w, a_format)
        expected = (2 * x.astype(int) - a_format.max_value) @ values_of(w)
        assert (product.shape, product.dtype) == ((3, 4, 1), jnp.int32)
        np.testing.assert_array_equal(product[..., 0], expected)


@every_backend
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.sample(2)
def test_the_largest_sum_that_fits_int32_is_exact(backend, sign):
    """K = 65,793 at A8, all weights -128 * S: 65793 * 255 * 128 = 2147483520."""
    fmt, k = BipolarFormat(1), 65_793
    groups = bj.IntegerGroups(jnp.ones((1, 1), jnp.uint8), jnp.full((1, 1), -128, jnp.int8))
    w = bj.from_codes(np.zeros((1, k), np.uint8), fmt, -1, np.ones((1, 1), np.float32), group_size=k, groups=groups).T
    x = jnp.full((1, k), 0 if sign == 1 else 255, jnp.uint8)
    assert backend.integer_matmul(x, w, BipolarFormat(8)).item() == sign * 2_147_483_520


def test_longer_rows_are_refused_by_the_bound():
    groups = bj.IntegerGroups(jnp.ones((1, 1), jnp.uint8), jnp.zeros((1, 1), jnp.int8))
    k = 65_794
    w = bj.from_codes(np.zeros((1, k), np.uint8), 1, -1, np.ones((1, 1), np.float32), group_size=k, groups=groups).T
    with pytest.raises(ValueError, match="sums 65794 products, and int32 is exact only up to 65793: .*float scales"):
        matmul(jnp.ones((1, k)), w, 8)


@every_backend
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.sample(2)
def test_products_are_those_of_what_the_codes_stand_for(backend, dtype):
    """Integers are exact, so a few float32 roundings of the result remain, and that of the output's dtype."""
    x = jnp.asarray(normal(5, 100), dtype)
    w = weights(4, 100, 48)
    wide = np.asarray(w.scale, np.float64).T * values_of(w)
    tokens = quantize_tokens(x, BipolarFormat(8))
    steps = 2.0 * np.asarray(tokens.codes) - 255 - np.asarray(tokens.zero_value, int)[:, None]
    got = backend.quantized_matmul(x, w, BipolarFormat(8), None)
    expected = np.asarray(tokens.scale, np.float64)[:, None] * steps @ wide
    assert got.dtype == dtype
    rounding = 4 * EPS + float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=rounding, atol=4 * EPS * np.abs(expected).max()
    )

    float_product = np.asarray(x, np.float64) @ wide
    sizes = np.abs(np.asarray(x, np.float64)) @ np.abs(wide)
    error = np.abs(np.asarray(backend.weight_only_matmul(x, w, None), np.float64) - float_product)
    assert np.all(error <= rounding * np.abs(float_product) + 100 * EPS * sizes)


def test_backends_agree_to_the_bit_on_stacks_with_bias_and_activation():
    x, bias = normal(2, 3, 100), normal(4, seed=2)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), weights(4, 100, 32, seed=1), weights(4, 100, 32, seed=2))
    options = {"bias": bias, "activation": bj.ops.Activation("silu")}
    one, other = (matmul(x, stack, 8, implementation=name, **options) for name in PORTABLE)
    np.testing.assert_array_equal(one, other)
    single = matmul(x[1], jax.tree.map(lambda leaf: leaf[1], stack), 8, **options)
    np.testing.assert_array_equal(single, other[1])
    unpacked = matmul(x, stack.unpack(), 8, implementation="xla", **options)
    np.testing.assert_array_equal(unpacked, other)


def test_gradient_of_the_row_scale_is_its_sum_over_the_row_and_integers_have_none():
    x, cotangent = normal(3, 70), normal(3, 4, seed=2)
    w = weights(4, 70, 32)
    gradient = jax.grad(lambda w: jnp.sum(matmul(x, w, 8) * cotangent), allow_int=True)(w)
    for leaf in (gradient.groups.scale, gradient.groups.offset, gradient.planes, gradient.row_sums):
        assert leaf.dtype == jax.dtypes.float0
    a_format = BipolarFormat(8)
    x_hat = np.asarray(quantize_tokens(x, a_format).dequantize(a_format), np.float64)
    expected = np.sum((cotangent.T @ x_hat) * values_of(w).T, axis=1, keepdims=True)
    np.testing.assert_allclose(gradient.scale, expected, rtol=1e-4)
    scaled = dataclasses.replace(w, scale=w.scale * 2)
    np.testing.assert_allclose(matmul(x, scaled, 8), 2 * matmul(x, w, 8), rtol=1e-6)


def test_a_table_with_integer_groups_is_looked_up():
    table = weights(6, 70, 32).T
    np.testing.assert_array_equal(bj.ops.lookup(table, jnp.array([4, 0])), table.dequantize()[jnp.array([4, 0])])
    assert np.isnan(bj.ops.lookup(table, jnp.array([6]))).all()


def test_one_dot_serves_all_groups():
    explained = bj.explain(jax.ShapeDtypeStruct((2, 64), jnp.bfloat16), weights(64, 64, 32), 8, implementation="xla")
    assert "for each of" not in explained.kernel
