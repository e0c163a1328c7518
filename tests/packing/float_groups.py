"""Random weights with float scales of groups, in NumPy, so that nothing compiles before a kernel does."""

from __future__ import annotations

import dataclasses

import numpy as np

from bipolar_jax import BipolarArray, BipolarFormat
from bipolar_jax.packing import BlockScaledArray
from bipolar_jax.packing.block_scaled_array import BlockForm
from bipolar_jax.packing.float_terms import BLOCK_TERMS, BlockTerms, FloatTerms
from tests.packing.integer_groups import array_of_codes
from tests.support.integer_products import random_codes

_BLOCK = 256


def float_groups(
    fmt: BipolarFormat,
    n: int,
    k: int,
    group_size: int,
    kind: FloatTerms,
    seed: int = 0,
    codes: np.ndarray | None = None,
) -> BipolarArray | BlockScaledArray:
    """The array [k, n] whose narrowest terms are of this form, with random codes; in the forms of blocks k is whole."""
    if kind in BLOCK_TERMS:
        return _block_groups(fmt, n, k, group_size, kind, seed)
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


def _block_groups(fmt: BipolarFormat, n: int, k: int, group_size: int, kind: BlockTerms, seed: int) -> BlockScaledArray:
    """Numbers of blocks and integers of groups at their limits and between; some steps are negative."""
    rng, groups, blocks = np.random.default_rng(seed), k // group_size, -(-k // _BLOCK)
    planes = array_of_codes(random_codes(fmt, n, k, seed + 1), fmt, np.ones(n, np.float32)).planes
    form = BlockForm(_BLOCK, (fmt.max_value + 1) // 2, group_scales="int8")
    if kind != "block_scales":
        form = BlockForm(_BLOCK, 0, minimum=True, group_scales="uint8" if kind == "block_minimums" else "nibbles")
    scale, minimum = (rng.uniform(-1e-3, 1e-3, (n, blocks)).astype(np.float16) for _ in range(2))
    low, high, dtype = {"int8": (-128, 127, np.int8), "uint8": (0, 63, np.uint8), "nibbles": (0, 255, np.uint8)}[
        form.group_scales
    ]
    scales, minimums = (rng.integers(low, high, (n, groups), dtype, endpoint=True) for _ in range(2))
    scales[0, :2] = low, high
    minimums[0, :2] = high, low
    minimums = minimums if form.has_group_minimums else None
    return BlockScaledArray(
        planes, scale, minimum if form.minimum else None, scales, minimums, fmt, k, -2, group_size, form
    )


def numbers_of(w: BipolarArray | BlockScaledArray) -> np.ndarray:
    """Its numbers [n, k] in float64."""
    group = np.arange(w.contracted_size) // w.group_size
    if isinstance(w, BlockScaledArray):
        stored, minimums = np.asarray(w.stored(), np.float64) - w.form.zero, w._minimums()
        numbers = np.asarray(w._steps(), np.float64)[:, group] * stored
        return numbers if minimums is None else numbers + np.asarray(minimums, np.float64)[:, group]
    values = 2.0 * np.asarray(w.codes(), np.float64) - w.format.max_value
    numbers = np.asarray(w.scale, np.float64)[:, group] * values
    return numbers if w.offset is None else numbers + np.asarray(w.offset, np.float64)[:, group]
