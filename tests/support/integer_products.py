"""Random operands: floats, and codes in all formats; and integer products by their definition."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from bipolar_jax import TERNARY, BipolarArray, BipolarFormat, from_codes
from bipolar_jax.quantize.integer_groups import IntegerGroups, largest_scale

A_FORMATS = [BipolarFormat(bits) for bits in range(1, 9)]
W_FORMATS = [*A_FORMATS, TERNARY]
# (a_format, w_format) where one is the narrowest or the widest, or both are alike: half of all pairs, for slow tests.
EXTREME_PAIRS = [(a, w) for a in A_FORMATS for w in W_FORMATS if {a.bits, w.bits} & {1, 8} or a.bits == w.bits]


def normal(*shape: int, seed: int = 0) -> Float32[np.ndarray, "..."]:
    """Standard normal numbers, the same in every run."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_codes(fmt: BipolarFormat, rows: int, k: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, fmt.max_value + 1, (rows, k), np.uint8)


def codes_with_extremes(fmt: BipolarFormat, rows: int, k: int, seed: int) -> np.ndarray:
    """Random codes; in every plane the first row is zeros, and the second, or the only one, is ones."""
    codes = random_codes(fmt, rows, k, seed)
    codes[0] = 0
    codes[min(1, rows - 1)] = fmt.max_value
    return codes


def packed(codes: np.ndarray, fmt: BipolarFormat, group_size: int | None) -> BipolarArray:
    groups = 1 if group_size is None else -(-codes.shape[1] // group_size)
    return from_codes(codes, fmt, -1, np.ones((codes.shape[0], groups), np.float32), group_size=group_size).T


def expected_product(
    x: np.ndarray, a_format: BipolarFormat, w: np.ndarray, w_format: BipolarFormat, group_size: int | None
) -> np.ndarray:
    """The product of values within every group, int64 [m, n, groups]; every number fits int32.

    Computed in float64, which is exact below 2^53: numpy has no BLAS for int64.
    """
    x_values, w_values = (2.0 * c - fmt.max_value for c, fmt in ((x, a_format), (w, w_format)))
    k = x.shape[1]
    size = group_size or k
    products = [x_values[:, s : s + size] @ w_values[:, s : s + size].T for s in range(0, k, size)]
    product = np.stack(products, axis=-1).astype(np.int64)
    assert np.abs(product).max() <= np.iinfo(np.int32).max
    return product


def packed_in_integer_groups(codes: np.ndarray, fmt: BipolarFormat, group_size: int, seed: int) -> BipolarArray:
    """[k, n] weights of these codes [n, k]; the scales and offsets of groups reach the ends of their ranges."""
    rng = np.random.default_rng(seed)
    rows, k = codes.shape
    per_group = (rows, -(-k // group_size))
    scale = rng.integers(1, largest_scale(fmt) + 1, per_group)
    scale[0] = largest_scale(fmt)
    offset = rng.integers(-128, 128 - fmt.max_value * scale)
    offset[0] = -128
    groups = IntegerGroups(jnp.asarray(scale, jnp.uint8), jnp.asarray(offset, jnp.int8))
    row_scale = rng.uniform(0.5, 2, (rows, 1)).astype(np.float32)
    return from_codes(codes, fmt, -1, row_scale, group_size=group_size, groups=groups).T
