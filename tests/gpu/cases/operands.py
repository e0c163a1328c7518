"""Operands whose exact products are known: NumPy only, so that nothing compiles before a kernel does."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from tests.support.integer_products import random_codes

EPS = float(np.finfo(np.float32).eps)
# Up to so many tokens prepared weights always take `prepared_few_tokens`; up to FEW_TOKENS_LIMIT they may.
ALWAYS_FEW = 16
_WORD_BITS = 32


def generator(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def exact_tokens(
    rng: np.random.Generator, m: int, k: int, a_format: BipolarFormat, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Activations that `quantize_tokens` represents exactly.

    Every row has scale * 2 * (code - zero code) with a scale that is a power of two and codes that reach both ends of
    the grid; one bit has +-scale. All are exact in bfloat16 and float16.

    Returns:
      x [m, k] in `dtype`; and float64 scale * (|value| + |zero value|), the size of the terms that a kernel adds up.
    """
    codes = rng.integers(0, a_format.max_value + 1, (m, k)).astype(np.int64)
    scale = 2.0 ** rng.integers(-8, -3, (m, 1))
    values = 2 * codes - a_format.max_value
    if a_format.bits == 1:
        zero = np.zeros((m, 1), np.int64)
    else:
        if k < 2:
            raise ValueError(f"rows of {k} numbers do not reach both ends of the grid: use k >= 2")
        values[:, 0], values[:, 1] = -a_format.max_value, a_format.max_value
        zero = 2 * rng.integers(0, a_format.max_value + 1, (m, 1)) - a_format.max_value
    x = (scale * (values - zero)).astype(dtype)
    return x, scale * (np.abs(values) + np.abs(zero))


def packed_weights(
    codes: np.ndarray, fmt: BipolarFormat, group_size: int | None, scale: np.ndarray, offset: np.ndarray | None
) -> BipolarArray:
    """`from_codes` of logical shape [k, n], on the host: codes are [n, k], scale and offset [n, groups]."""
    k = codes.shape[1]
    padded = np.pad(codes, ((0, 0), (0, -k % _WORD_BITS)))
    planes = np.stack([np.asarray(fmt.bit(padded, plane)) for plane in range(fmt.bits)])
    return BipolarArray(
        planes=np.packbits(planes.astype(np.uint8), axis=-1, bitorder="little").view(np.uint32),
        scale=np.asarray(scale, np.float32),
        offset=None if offset is None else np.asarray(offset, np.float32),
        row_sums=np.add.reduceat(codes, np.arange(0, k, group_size or k), axis=1, dtype=np.int32),
        format=fmt,
        contracted_size=k,
        axis=-2,
        group_size=group_size,
    )


def random_weights(
    rng: np.random.Generator, n: int, k: int, fmt: BipolarFormat, group_size: int | None, offsets: bool
) -> BipolarArray:
    """Weights [k, n] so small that products, and gates times products, fit float16."""
    groups = -(-k // (group_size or k))
    scale = rng.uniform(0.5, 1.5, (n, groups)) / (fmt.max_value * np.sqrt(k))
    offset = rng.normal(size=(n, groups)) / k if offsets else None
    codes = random_codes(fmt, n, k, int(rng.integers(1 << 30)))
    return packed_weights(codes, fmt, group_size, scale, offset)


def numbers_of(w: BipolarArray) -> tuple[np.ndarray, np.ndarray]:
    """w [k, n] in float64, by the definition of `BipolarArray`; and |scale * value| + |offset|."""
    k = w.contracted_size
    bits = np.unpackbits(np.asarray(w.planes).view(np.uint8), axis=-1, bitorder="little")[..., :k].astype(np.int64)
    weights = np.asarray(w.format.plane_weights).reshape(-1, 1, 1)
    values = (2 * bits - 1) * weights

    def spread(term):
        return np.repeat(np.asarray(term, np.float64), w.group_size or k, axis=1)[:, :k].T

    scaled = spread(w.scale) * values.sum(axis=0).T
    offset = 0.0 if w.offset is None else spread(w.offset)
    return scaled + offset, np.abs(scaled) + np.abs(offset)


def assert_within(got: np.ndarray, expected: np.ndarray, tolerance: np.ndarray) -> None:
    """Raises AssertionError with the worst number unless |got - expected| <= tolerance everywhere, NaN nowhere."""
    if got.shape != expected.shape:
        raise AssertionError(f"shape {got.shape}, expected {expected.shape}")
    error = np.abs(np.asarray(got, np.float64) - expected)
    wrong = ~(error <= tolerance)
    if wrong.any():
        share = np.where(wrong, np.nan_to_num(error, nan=np.inf), 0.0)
        worst = np.unravel_index(np.argmax(share), error.shape)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} numbers beyond their tolerance; at {tuple(map(int, worst))} got "
            f"{float(got[worst]):.9g}, expected {float(expected[worst]):.9g} within "
            f"{float(np.broadcast_to(tolerance, error.shape)[worst]):.3g}"
        )


def rounding(dtype: Any, numbers: np.ndarray) -> np.ndarray | float:
    """The most that one rounding to `dtype` changes these numbers; 0 for float32, whose sums are rounded anyway."""
    if np.dtype(dtype) == np.float32:
        return 0.0
    info = ml_dtypes.finfo(dtype)
    return float(info.eps) * np.abs(numbers) + float(info.smallest_subnormal)
