"""integer_matmul of every backend is the int32 product of decoded values, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bipolar_jax import TERNARY, BipolarFormat
from tests.support.backends import PORTABLE
from tests.support.integer_products import A_FORMATS, W_FORMATS, codes_with_extremes, expected_product, packed

M, N = 3, 4

every_backend = pytest.mark.parametrize("backend", PORTABLE.values(), ids=PORTABLE)

# The reference runs operation by operation here: its operations are the same for every plane and
# so compile once for each K, where under jit all the planes of all the pairs would compile anew.
# It meets jit in test_product_is_exact_at_any_size.
NOT_JITTED = {PORTABLE["reference"]}


def check_all_a_bits(backend, w_format: BipolarFormat, k: int, group_size: int | None):
    """One compilation for the eight activation formats."""
    xs = [codes_with_extremes(a_format, M, k, seed=a_format.bits) for a_format in A_FORMATS]
    w = codes_with_extremes(w_format, N, k, seed=9)

    def products(xs, w):
        return [backend.integer_matmul(x, w, a_format) for x, a_format in zip(xs, A_FORMATS, strict=True)]

    run = products if backend in NOT_JITTED else jax.jit(products)
    got = run([jnp.asarray(x) for x in xs], packed(w, w_format, group_size))
    for x, a_format, product in zip(xs, A_FORMATS, got, strict=True):
        assert product.dtype == jnp.int32
        expected = expected_product(x, a_format, w, w_format, group_size)
        np.testing.assert_array_equal(product, expected, err_msg=f"W{w_format.name}A{a_format.name} {k=}")


@every_backend
@pytest.mark.parametrize("w_format", W_FORMATS, ids=lambda fmt: f"W{fmt.name}")
@pytest.mark.parametrize("k", [1, 31, 32, 33, 576, 1000, 4096])
@pytest.mark.sample(2)
def test_product_is_exact(backend, w_format, k):
    check_all_a_bits(backend, w_format, k, None)


@every_backend
@pytest.mark.parametrize(
    "w_format", [BipolarFormat(1), BipolarFormat(3), BipolarFormat(8), TERNARY], ids=lambda fmt: f"W{fmt.name}"
)
@pytest.mark.parametrize(
    ("k", "group_size"),
    [(33, 1), (96, 32), (100, 7), (100, 64), (576, 48), (70, 33), (70, 69)],
)
@pytest.mark.sample(2)
def test_product_of_every_group_is_exact(backend, w_format, k, group_size):
    """Groups that end on words and that do not, and short last ones (100 = 14 * 7 + 2 = 64 + 36)."""
    check_all_a_bits(backend, w_format, k, group_size)


@every_backend
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_that_fits_int32_is_exact(backend, sign):
    """K = max_contraction at 8 x 8 bits, all values +-255: 33025 * 255^2 = 2147450625."""
    fmt = BipolarFormat(8)
    k = fmt.max_contraction(fmt)
    x = jnp.full((1, k), 255 if sign == 1 else 0, jnp.uint8)
    product = backend.integer_matmul(x, packed(np.full((1, k), 255), fmt, None), fmt)
    assert product.item() == sign * 2_147_450_625


@every_backend
@settings(max_examples=6)
@example(m=1, n=1, k=65, group_size=33, w_format=TERNARY, a_bits=8, seed=0)
@given(
    m=st.integers(1, 5),
    n=st.integers(1, 5),
    k=st.integers(1, 200),
    group_size=st.none() | st.integers(1, 200),
    w_format=st.sampled_from(W_FORMATS),
    a_bits=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
@pytest.mark.sample(1)
def test_product_is_exact_at_any_size(backend, m, n, k, group_size, w_format, a_bits, seed):
    group_size = None if group_size is None else min(group_size, k)
    a_format = BipolarFormat(a_bits)
    x = codes_with_extremes(a_format, m, k, seed)
    w = codes_with_extremes(w_format, n, k, seed + 1)
    product = jax.jit(backend.integer_matmul, static_argnums=2)(x, packed(w, w_format, group_size), a_format)
    np.testing.assert_array_equal(product, expected_product(x, a_format, w, w_format, group_size))


@every_backend
def test_what_fills_the_last_word_is_not_read_as_values(backend):
    """33 ones by 33 ones at one bit is 33, not 64 and not 33 - 31."""
    fmt = BipolarFormat(1)
    product = backend.integer_matmul(jnp.ones((1, 33), jnp.uint8), packed(np.ones((1, 33), int), fmt, None), fmt)
    assert product.item() == 33
