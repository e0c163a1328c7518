"""ops.matmul: operands, results, errors. Its gradients are in test_ops_gradients.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import TERNARY, BipolarArray, from_codes, matmul, quantize
from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from tests.support.backends import PORTABLE

NAMES = ["auto", *PORTABLE]
K, N = 40, 6


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def w() -> BipolarArray:
    return quantize(normal(K, N, seed=1), 4, 0, 16, "minmax", scales="float")


def expected(x, w: BipolarArray, a_bits: int | None) -> np.ndarray:
    """float64 product of the quantized x with the dequantized w."""
    rows = jnp.asarray(x).reshape(-1, w.contracted_size)
    if a_bits is not None:
        rows = quantize_tokens(rows, BipolarFormat(a_bits)).dequantize(BipolarFormat(a_bits))
    product = np.asarray(rows, np.float64) @ np.asarray(w.dequantize(), np.float64)
    return product.reshape(*np.shape(x)[:-1], -1)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("a_bits", [1, 8, None])
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K)])
@pytest.mark.sample(2)
def test_batch_axes_of_x_are_rows(w, shape, a_bits, implementation):
    x, bias = normal(*shape), normal(N)
    y = matmul(x, w, a_bits, bias=bias, implementation=implementation)
    assert y.shape == (*shape[:-1], N)
    # Numbers of order 10, a few float32 roundings each.
    np.testing.assert_allclose(y, expected(x, w, a_bits) + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("a_bits", [8, None])
def test_the_result_has_the_dtype_of_x(w, dtype, a_bits):
    x = jnp.asarray(normal(3, K), dtype)
    y = matmul(x, w, a_bits, bias=jnp.zeros(N))
    assert y.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(y.astype(jnp.float32), expected(x, w, a_bits), rtol=2 * eps, atol=40 * eps)


@pytest.mark.parametrize("x_shape", [(3, K), (3, 5, K), (3, 5, 2, K)])
@pytest.mark.parametrize("bits", [2, TERNARY])
@pytest.mark.sample(2)
def test_batch_axes_of_w_lead_those_of_x(x_shape, bits):
    w = quantize(normal(3, K, N, seed=1), bits, -2)
    x, bias = normal(*x_shape), normal(N)
    y = matmul(x, w, 8, bias=bias)
    assert y.shape == (*x_shape[:-1], N)
    for i in range(3):
        alone = jax.tree.map(lambda leaf, i=i: leaf[i], w)
        np.testing.assert_allclose(y[i], expected(x[i], alone, 8) + bias, rtol=1e-5, atol=1e-4)


def test_two_batch_axes_of_w():
    w = quantize(normal(2, 3, K, N, seed=1), 2, -2)
    x = normal(2, 3, 5, K)
    y = matmul(x, w, 8)
    alone = jax.tree.map(lambda leaf: leaf[1, 2], w)
    np.testing.assert_allclose(y[1, 2], expected(x[1, 2], alone, 8), rtol=1e-5, atol=1e-4)


def test_a_transposed_embedding_multiplies():
    table = quantize(normal(N, K, seed=1), 4, -1)
    np.testing.assert_allclose(
        matmul(normal(3, K), table.T, None), expected(normal(3, K), table.T, None), rtol=1e-5, atol=1e-4
    )


def test_jit_and_vmap_give_the_same(w):
    x = normal(4, 3, K)
    y = matmul(x, w, 8)
    product = lambda x, w: matmul(x, w, 8)  # noqa: E731
    np.testing.assert_allclose(jax.jit(product)(x, w), y, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(product, in_axes=(0, None))(x, w), y, rtol=1e-6, atol=1e-5)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), w)
    np.testing.assert_allclose(jax.vmap(product)(x, stack), y, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("a_bits", [1, 8, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_loud_in_their_row_only(w, bad, a_bits, implementation):
    x = normal(3, K)
    clean = matmul(x, w, a_bits, implementation=implementation)
    x[1, 7] = bad
    y = np.asarray(matmul(x, w, a_bits, implementation=implementation))
    assert not np.any(np.isfinite(y[1]))
    np.testing.assert_array_equal(y[[0, 2]], clean[np.array([0, 2])])


def one_column(k: int, **kwargs) -> BipolarArray:
    """255 everywhere, at 8 bits."""
    groups = -(-k // kwargs.get("group_size", k))
    return from_codes(np.full((k, 1), 255, np.uint8), 8, 0, np.ones((1, groups), np.float32), **kwargs)


def test_k_beyond_int32_is_refused_with_the_limit_and_the_remedy():
    with pytest.raises(ValueError, match=r"W8A8 sums 33026 products.*33025: .*group_size"):
        matmul(jnp.ones(33_026), one_column(33_026), 8)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.sample(2)
def test_the_largest_k_and_groups_beyond_it_are_served(implementation):
    """x of ones is exact at 8 bits: v - v0 = 510 and scale = 1 / 510; the sum has 25 significant bits."""
    for w in (one_column(33_025), one_column(40_000, group_size=20_000)):
        y = matmul(jnp.ones(w.contracted_size), w, 8, implementation=implementation)
        np.testing.assert_allclose(y, [255.0 * w.contracted_size], rtol=1e-6)


def test_weight_only_has_no_limit_on_k():
    np.testing.assert_allclose(matmul(jnp.ones(33_026), one_column(33_026), None), [255.0 * 33_026], rtol=1e-5)


def test_offsets_do_not_overflow_at_large_k():
    """W1A8 may contract 8,421,504. Here v - v0 = 510 at each of 4.5 million, whose sum is beyond int32.

    w = 1 * (+1) + 1 = 2 everywhere and x = 1, so that y = 2 K.
    """
    k = 4_500_000
    w = from_codes(jnp.ones((k, 1), jnp.uint8), 1, 0, jnp.ones((1, 1)), jnp.ones((1, 1)))
    np.testing.assert_allclose(matmul(jnp.ones(k), w, 8), [2.0 * k], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": jnp.ones((3, K), jnp.int8)}, "x must be float32, bfloat16, float16, got int8: cast it"),
        ({"x": jnp.ones((3, K + 1))}, rf"x of shape \(3, {K + 1}\) does not fit w of shape \({K}, {N}\).*k=40"),
        ({"x": jnp.float32(1)}, r"x of shape \(\) does not fit"),
        ({"a_bits": 0}, "from 1 to 8, got 0"),
        ({"a_bits": 9}, "from 1 to 8, got 9"),
        ({"a_bits": 2.5}, r"from 1 to 8, got 2\.5"),
        ({"bias": jnp.ones(N + 1)}, rf"bias has shape \({N + 1},\), w of shape \({K}, {N}\) needs \({N},\)"),
        ({"bias": jnp.ones((1, N))}, rf"bias has shape \(1, {N}\)"),
        ({"w": jnp.ones((K, N))}, r"BipolarArray, got ArrayImpl: make one with bipolar_jax\.quantize"),
        ({"implementation": "cuda"}, "one of auto, reference, sm90, xla; got 'cuda'"),
    ],
)
def test_errors_name_the_value_and_the_remedy(w, arguments, message):
    with pytest.raises(ValueError, match=message):
        matmul(**{"x": jnp.ones((3, K)), "w": w, "a_bits": 8} | arguments)


def test_w_packed_along_the_wrong_axis_is_refused():
    with pytest.raises(ValueError, match=r"w of shape \(40, 6\) is packed along its last axis.*pass w\.T.*axis=-2"):
        matmul(jnp.ones((3, K)), quantize(normal(K, N), 4, -1), 8)


def test_batch_axes_that_do_not_fit_are_refused():
    w = quantize(normal(2, K, N), 4, -2)
    for shape in ((K,), (3, K), (3, 2, K)):
        with pytest.raises(ValueError, match=r"batch axes \(2,\) of w: they must lead x's shape"):
            matmul(jnp.ones(shape), w, 8)


@pytest.mark.wrong_arrays
def test_inconsistent_leaves_are_refused(w):
    with pytest.raises(ValueError, match="inconsistent BipolarArray"):
        matmul(jnp.ones((3, K)), dataclasses.replace(w, scale=w.scale[:, :1]), 8)
