"""Products of unpacked weights on a CPU, in blocks and in slices of K that float32 sums exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.format import BipolarFormat
from bipolar_jax.kernels import xla
from bipolar_jax.kernels.xla import blocks
from tests.support.integer_products import normal


@pytest.mark.parametrize(
    ("m", "k", "n", "bits", "group_size"),
    [
        (1, 64, 1499, 4, None),  # a block and a shorter one
        (3, 100, 1100, 8, 64),  # two blocks of each group, the last of which is short
        (1, 2100, 40, 8, None),  # three slices of K, and two blocks
        (blocks._MANY_ROWS, 2100, 40, 8, None),  # no blocks
    ],
)
def test_integers_are_exact_in_blocks_and_slices(m, k, n, bits, group_size):
    """All codes of one column and one token are the lowest: the sums of their products are the largest there are."""
    generator = np.random.default_rng(0)
    w_codes = generator.integers(0, 2**bits, (k, n))
    w_codes[:, 1] = 0
    groups = -(-k // (group_size or k))
    w = bj.from_codes(w_codes, bits, 0, jnp.ones((n, groups)), group_size=group_size)
    codes = generator.integers(0, 256, (m, k)).astype(np.uint8)
    codes[0] = 0
    x_values, w_values = 2 * codes.astype(int) - 255, 2 * w_codes - (2**bits - 1)
    starts = range(0, k, group_size or k)
    parts = [slice(start, start + (group_size or k)) for start in starts]
    expected = np.stack([x_values[:, part] @ w_values[part] for part in parts], -1)
    found = jax.jit(xla.integer_matmul, static_argnums=2)(codes, w.unpack(), BipolarFormat(8))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weight_only_products_in_blocks_are_those_of_the_whole(dtype):
    w = bj.quantize(normal(64, 1500), 8, 0)
    x = jnp.asarray(normal(blocks._MANY_ROWS, 64), dtype)
    whole = bj.matmul(x, w, None)
    in_blocks = bj.matmul(x[:3], w.unpack(), None)
    tolerance = 64 * float(jnp.finfo(jnp.float32).eps) if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    size = jnp.abs(x.astype(jnp.float32)) @ jnp.abs(w.dequantize())
    assert jnp.all(jnp.abs(in_blocks.astype(jnp.float32) - whole[:3].astype(jnp.float32)) <= tolerance * size[:3])


@pytest.mark.parametrize("m", [3, blocks._MANY_ROWS], ids=["few rows", "many rows"])
def test_float_activations_take_one_product_for_all_float_groups(m, monkeypatch):
    """As on a GPU: few rows a batch of exact products; many rows weights rounded to x's dtype."""
    monkeypatch.setattr("bipolar_jax.kernels.xla.matmul.on_cpu", lambda: False)
    w = bj.quantize(normal(70, 9) + 0.5, 4, 0, group_size=32, calibration="minmax", scales="float")
    x = jnp.asarray(normal(m, 70, seed=1), jnp.bfloat16)
    assert w.offset is not None
    product = jax.jit(xla.weight_only_matmul)
    assert "scan" not in str(jax.make_jaxpr(product)(x, w, None))
    wide, w_hat = np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64)
    eps = float(jnp.finfo(jnp.bfloat16).eps) / 2
    exact, sizes = wide @ w_hat, np.abs(wide) @ np.abs(w_hat)
    error = np.abs(np.asarray(product(x, w, None), np.float64) - exact)
    assert np.all(error <= eps * np.abs(exact) + (1e-6 if m < blocks._MANY_ROWS else eps) * sizes)
