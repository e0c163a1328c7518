"""Random weights with float scales of groups, in NumPy, so that nothing compiles before a kernel does."""

from __future__ import annotations

import dataclasses

import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.packing.float_terms import FloatTerms
from tests.packing.integer_groups import array_of_codes
from tests.support.integer_products import random_codes


def float_groups(
    fmt: BipolarFormat,
    n: int,
    k: int,
    group_size: int,
    kind: FloatTerms,
    seed: int = 0,
    codes: np.ndarray | None = None,
) -> BipolarArray:
    """The array [k, n] whose narrowest terms are of this form, with random codes."""
    rng, groups = np.random.default_rng(seed), -(-k // group_size)
    codes = random_codes(fmt, n, k, seed + 1)
    scale, offset = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32), None
    if kind == "zeros":
        scale = scale.astype(np.float16).astype(np.float32) / 2
        zero = rng.integers(0, fmt.max_value + 1, (n, groups))
        offset = (scale * (fmt.max_value - 2 * zero)).astype(np.float32)
    elif kind == "minimums":
        scale, minimum = (
            each.astype(np.float16).astype(np.float32) for each in (scale, rng.uniform(-0.5, 0, scale.shape))
        )
        offset, scale = minimum + scale * np.float32(fmt.max_value / 2), scale / 2
    elif kind == "offsets":
        offset = rng.uniform(-0.2, 0.2, (n, groups)).astype(np.float32)
    padded = np.pad(codes, ((0, 0), (0, groups * group_size - k)))
    sums = padded.reshape(n, groups, group_size).sum(-1, dtype=np.int32)
    array = array_of_codes(codes, fmt, np.ones(n, np.float32))
    return dataclasses.replace(array, scale=scale, offset=offset, row_sums=sums, group_size=group_size)


def numbers_of(w: BipolarArray) -> np.ndarray:
    """Its numbers [n, k] in float64."""
    group = np.arange(w.contracted_size) // w.group_size
    values = 2.0 * np.asarray(w.codes(), np.float64) - w.format.max_value
    numbers = np.asarray(w.scale, np.float64)[:, group] * values
    return numbers if w.offset is None else numbers + np.asarray(w.offset, np.float64)[:, group]
