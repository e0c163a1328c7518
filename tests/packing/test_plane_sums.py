"""Sums of codes by planes are those of the unpacked codes."""

from __future__ import annotations

import numpy as np
import pytest

from bipolar_jax import TERNARY, quantize
from bipolar_jax.packing.bipolar_array import code_sums
from bipolar_jax.packing.plane_sums import host_plane_sums, plane_sums
from tests.support.integer_products import normal


@pytest.mark.parametrize("bits", [1, 3, 8, TERNARY], ids=str)
@pytest.mark.parametrize(("shape", "group_size"), [((70, 3), None), ((70, 3), 32), ((70, 3), 7), ((2, 3, 96, 5), 64)])
@pytest.mark.sample(2)
def test_both_ways_agree_with_the_codes(bits, shape, group_size):
    w = quantize(normal(*shape), bits, -2, group_size, scales="float")
    expected = np.asarray(code_sums(w.codes(), group_size))
    arguments = w.format, w.contracted_size, group_size
    np.testing.assert_array_equal(plane_sums(w.planes, *arguments), expected)
    np.testing.assert_array_equal(host_plane_sums(np.asarray(w.planes), *arguments), expected)
    np.testing.assert_array_equal(w.row_sums, expected)
