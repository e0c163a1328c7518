"""Matrices of a stack as one matrix: the numbers of each, side by side."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.packing.columns import fill_tiles, side_by_side

STACK = np.random.default_rng(0).normal(size=(3, 64, 128)).astype(np.float32)


@pytest.fixture(scope="module")
def packed():
    return bj.quantize(STACK, 4, -2, group_size=32)


def beside(numbers: np.ndarray) -> np.ndarray:
    return np.concatenate(list(numbers), axis=-1)


@pytest.mark.parametrize("layout", ["planes", "bytes", "tensor_cores", "gated"])
def test_columns_are_those_of_each_matrix(packed, layout):
    stack = {
        "planes": lambda: packed,
        "bytes": packed.unpack,
        "tensor_cores": packed.prepare,
        "gated": lambda: packed.prepare(gated=True),
    }[layout]()
    numbers = np.asarray(packed.dequantize())
    wanted = beside(numbers)
    if layout == "gated":
        wanted = np.concatenate([beside(numbers[..., :64]), beside(numbers[..., 64:])], axis=-1)
    merged = side_by_side(stack)
    merged.check()
    np.testing.assert_array_equal(merged.dequantize(), wanted)


def test_columns_that_end_within_a_tile_are_refused(packed):
    part = jax.tree.map(lambda leaf: leaf[..., :96, :], packed).prepare()
    assert not fill_tiles(part)
    with pytest.raises(ValueError, match="do not fill tiles of 128: prepare the joined array"):
        side_by_side(part)
    with pytest.raises(ValueError, match="expected a stack of matrices"):
        side_by_side(jax.tree.map(lambda leaf: leaf[0], packed))
